import json
import math

import numpy as np
import pytest
from support.short_runs import short_run, start

from mlx_moe.analysis.experts import (
    Routes,
    analyse,
    chosen,
    clone_figures,
    router_entropy,
    taken_tokens,
    twins,
    weight_distances,
)
from mlx_moe.config import ModelConfig, MoEConfig
from mlx_moe.parameters import initialize
from mlx_moe.training.backend import choose_backend
from mlx_moe.transfer.growth import grow_config, plan_growth
from mlx_moe.transfer.plan import apply_numpy


def test_entropy_of_the_router():
    assert router_entropy(np.zeros((5, 8), np.float32)) == pytest.approx(math.log(8))
    assert router_entropy(np.array([[1000, 0, 0]], np.float32)) == 0
    assert router_entropy(np.log(np.array([[1, 1, 2]], np.float32))) == pytest.approx(1.5 * math.log(2))


def test_distances_are_relative_and_over_all_tensors():
    random = np.random.default_rng(0)
    up = random.standard_normal((4, 30, 20)).astype(np.float32)
    down = random.standard_normal((4, 20, 30)).astype(np.float32)
    up[1], down[1] = up[0], down[0]
    up[2], down[2] = -up[0], -down[0]
    distances = weight_distances([up, down])
    assert distances[0, 1] == 0
    assert distances[0, 2] == pytest.approx(2)
    assert distances[0, 3] == pytest.approx(math.sqrt(2), abs=0.1)
    assert np.array_equal(distances, distances.T)
    assert distances == pytest.approx(weight_distances([7 * up, 7 * down]))
    assert twins(distances) == [[0, 1]]


def test_tokens_that_an_expert_takes():
    # "a" goes to expert 0, "b" to 1, "c" to either; "d" is too rare to say.
    tokens = np.repeat([0, 1, 2, 3], [40, 30, 50, 5])
    experts = np.concatenate([np.zeros(40, int), np.ones(30, int), np.arange(50) % 2, np.zeros(5, int)])
    taken = taken_tokens(tokens, chosen(experts[:, None], 3), ["a", "b", "c", "d"])
    share = np.mean(experts == 0)
    assert [token.text for token in taken[0]] == ["a"]
    assert (taken[0][0].occurrences, taken[0][0].share, taken[0][0].lift) == (40, 1, pytest.approx(1 / share))
    assert [token.text for token in taken[1]] == ["b", "c"]
    assert taken[2] == []  # nobody's


def test_clones_part_only_where_their_weights_do():
    before = ModelConfig(vocab_size=16, context_length=8, d_model=16, n_layers=2, n_heads=2, d_ff=12, moe=MoEConfig())
    after = grow_config(before, d_model=24, n_layers=3)
    weights = apply_numpy(plan_growth(before, after), initialize(before, 0))
    experts = np.zeros((3, 10, 2), np.int64)
    experts[0], experts[1] = [0, 2], [1, 0]
    routes = Routes(np.zeros(10, np.int32), np.zeros((3, 10, 8), np.float32), experts)
    born = clone_figures(0, before, after, "uneven", weights, routes)
    assert (born["neurons"], born["twin_neurons"]) == (8 * 6, 8 * 6)
    assert "copy_of" not in born
    copy = clone_figures(1, before, after, "uneven", weights, routes)
    assert (copy["copy_of"], copy["same_experts"], copy["neurons"]) == (0, 0.5, 0)
    assert clone_figures(1, before, after, "even", weights, routes)["neurons"] == 8 * 6
    weights["layers.0.mlp.experts.up_proj.weight"][3, 13] += 0.1
    assert clone_figures(0, before, after, "uneven", weights, routes)["twin_neurons"] == 8 * 6 - 1


@pytest.fixture(scope="module")
def found(finished):
    return {name: analyse(finished, choose_backend(name), "cpu", 8) for name in ("torch", "mlx")}


def test_every_checkpoint_with_experts(found):
    checkpoints = found["torch"]["checkpoints"]
    assert {(one["phase"], one["step"]) for one in checkpoints} >= {(2, 0), (2, 10), (3, 0), (3, 8)}
    for one in checkpoints:
        assert len(one["layers"]) == (2 if one["phase"] == 2 else 3)
        for layer in one["layers"]:
            together = np.array(layer["together"])
            assert sum(layer["load"]) == pytest.approx(1, abs=1e-4)
            assert np.diag(together) == pytest.approx(2 * np.array(layer["load"]), abs=1e-4)
            assert together.sum() == pytest.approx(4, abs=1e-3)  # 2 experts each: 2 alone, 2 ordered pairs
    birth, end = checkpoints[0]["layers"], next(one for one in checkpoints if one["step"] == 10)["layers"]
    assert [len(layer["twins"]) for layer in birth] == [6, 6]
    assert [layer["twins"] for layer in end] == [[], []]
    grown = next(one for one in checkpoints if (one["phase"], one["step"]) == (3, 0))
    clones = [layer["clones"] for layer in grown["layers"]]
    assert [one["neurons"] > 0 for one in clones] == ["copy_of" not in one for one in clones]
    assert all(one.get("twin_neurons", 0) == one["neurons"] for one in clones)


def test_both_backends_find_the_same(found):
    for one, other in zip(found["torch"]["checkpoints"], found["mlx"]["checkpoints"], strict=True):
        for layer, same in zip(one["layers"], other["layers"], strict=True):
            assert layer["load"] == pytest.approx(same["load"], abs=5e-3)  # ties may fall differently
            assert layer["entropy"] == pytest.approx(same["entropy"], abs=1e-4)
            assert layer["distance"] == same["distance"]


def test_a_zero_router_leaves_twins_and_dead_experts(tmp_path):
    run = short_run(
        *("phases.moe.router_init=zero", "phases.moe.load_balance_coefficient=0", "phases.moe.z_loss_coefficient=0"),
        "model.dropout=0",
    )
    start(run, tmp_path / "zero", n_phases=2)
    last = analyse(tmp_path / "zero", choose_backend("torch"), "cpu", 8)["checkpoints"][-1]
    for layer in last["layers"]:
        assert layer["load"] == [0.5, 0.5, 0, 0]
        assert layer["dead"] == [2, 3]
        assert [0, 1] in layer["twins"]
        assert [2, 3] in layer["twins"]
        assert [0, 2] not in layer["twins"]


def test_the_command(finished, mlxmoe, tmp_path):
    out = tmp_path / "found.json"
    result = mlxmoe("experts", finished, "--out", out, "--sequences", 4, "--backend", "torch")
    assert result.code == 0, result.err
    assert json.loads(out.read_text())["tokens"] == 4 * 16
    for said in ("2-moe 0 ", "12/12", "3-large-moe 8 ", "twin neurons", "0.0 "):
        assert said in result.out


def test_what_has_no_experts_is_said(dense, mlxmoe, tmp_path):
    assert "no checkpoint with experts" in mlxmoe("experts", dense).err
    assert "config.yaml" in mlxmoe("experts", tmp_path).err
