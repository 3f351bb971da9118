"""The main job at a size of seconds: three phases on each backend, resumed, handed over, gated."""

import json
import math
import shutil

import numpy as np
import pytest
from support.short_runs import checkpoint_folder

from mlx_moe.config import RunConfig
from mlx_moe.phases import get_phase
from mlx_moe.storage import checkpoint, jsonl
from mlx_moe.storage.reading import read_mapping
from mlx_moe.transfer.plan import carry_moments
from mlx_moe.validation import validate

BACKENDS = ("mlx", "torch")
STEPS = 30
TINY = [
    *("--preset", "demo", "--data", "stories", "--tokenizer", "bpe:400", "--steps", str(STEPS)),
    *("-o", "data.n_documents=300", "-o", "model.d_model=32", "-o", "model.n_layers=2", "-o", "model.n_heads=2"),
    *("-o", "model.context_length=32", "-o", "training.batch_size=8", "-o", "training.eval_sequences=32"),
    *("-o", "phases.large_moe.d_model=48", "-o", "phases.large_moe.n_layers=3", "-o", "phases.moe.n_experts=4"),
    *("-o", "training.checkpoint_every=12", "-o", "training.log_every=5"),
]


@pytest.fixture(scope="module", params=BACKENDS)
def finished(request, mlxmoe, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param) / "run"
    result = mlxmoe("train", *TINY, "--backend", request.param, "--out", directory)
    assert result.code == 0, result.err
    return directory, result


def test_every_phase_learns(finished):
    directory, _ = finished
    phases = [row for row in jsonl.read(directory / "history.jsonl") if row["event"] == "phase"]
    assert [row["phase"] for row in phases] == [1, 2, 3]
    for row in phases:
        assert row["last_validation_loss"] < row["first_validation_loss"]


def test_both_boundaries_are_lossless(finished):
    directory, _ = finished
    for name in ("1-2", "2-3"):
        certificate = json.loads((directory / "boundaries" / f"{name}.json").read_text())
        assert certificate["passed"]
        assert certificate["max_logit_difference"] < 1e-4
        assert abs(certificate["loss_jump"]) < 1e-3
        assert len(certificate["logit_differences"]) == 8


def test_validation_goes_on_where_it_stood(finished):
    directory, _ = finished
    rows = jsonl.read(directory / "metrics.jsonl")
    for phase in (1, 2):
        last = [row["validation_loss"] for row in rows if row["phase"] == phase and "validation_loss" in row][-1]
        first = next(row["validation_loss"] for row in rows if row["phase"] == phase + 1)
        assert math.isclose(last, first, abs_tol=1e-5)


def test_the_folder_holds_everything(finished):
    directory, _ = finished
    for name in ("config.yaml", "environment.json", "data.json", "tokenizer/tokenizer.json", "metrics.jsonl"):
        assert (directory / name).is_file()
    kept = [str(path.relative_to(directory / "phases")) for path in checkpoint.complete_in(directory)]
    assert kept == [
        "1-dense/checkpoints/step-24",
        "1-dense/checkpoints/step-30",
        "2-moe/checkpoints/step-0",
        "2-moe/checkpoints/step-24",
        "2-moe/checkpoints/step-30",
        "3-large-moe/checkpoints/step-0",
        "3-large-moe/checkpoints/step-24",
        "3-large-moe/checkpoints/step-30",
    ]
    assert (directory / "samples.md").read_text().count("**") == 2 * 9


def test_the_saved_config_is_the_run(finished):
    directory, _ = finished
    run = validate(RunConfig, read_mapping(directory / "config.yaml"))
    assert run.model.vocab_size == 400
    assert run.phases["moe"].steps == STEPS


def test_expert_load_is_in_the_metrics(finished):
    directory, _ = finished
    rows = [row for row in jsonl.read(directory / "metrics.jsonl") if row["phase"] == 3 and "loss" in row]
    for row in rows:
        load_LE = np.array(row["expert_load"])
        assert load_LE.shape == (3, 4)
        np.testing.assert_allclose(load_LE.sum(axis=1), 1, atol=1e-4)


def test_the_terminal_tells_the_story(finished):
    _, result = finished
    for text in (
        "backend",
        "Phase 2: mixture of experts",
        "idle experts",
        "Boundary 2-3: growth",
        "lossless",
        "Summary",
    ):
        assert text in result.out


def test_stopping_between_phases_changes_nothing(finished, mlxmoe, tmp_path):
    whole, _ = finished
    backend = json.loads((whole / "environment.json").read_text())["backend"]
    pieces = tmp_path / "run"
    assert mlxmoe("train", *TINY, "--backend", backend, "--out", pieces, "--phases", 1).code == 0
    assert mlxmoe("train", "--resume", pieces, "--phases", 2).code == 0
    assert mlxmoe("train", "--resume", pieces, "--phases", 3).code == 0
    expected, actual = checkpoint.load(whole), checkpoint.load(pieces)
    for name, array in expected.weights.items():
        np.testing.assert_array_equal(actual.weights[name], array)
    for rows in zip(jsonl.read(whole / "metrics.jsonl"), jsonl.read(pieces / "metrics.jsonl"), strict=True):
        assert rows[0].get("loss") == rows[1].get("loss")


def test_a_phase_is_born_with_the_moments_of_the_one_before(finished):
    directory, _ = finished
    run = validate(RunConfig, read_mapping(directory / "config.yaml"))
    for phase in (1, 2):
        before = checkpoint.load(checkpoint_folder(directory, phase, STEPS))
        born = checkpoint.load(checkpoint_folder(directory, phase + 1, 0))
        expected = carry_moments(
            plan_of(run, phase + 1, before.config), before.optimizer_state, born.optimizer_state.keys()
        )
        assert born.optimizer_state.keys() == expected.keys()
        assert born.optimizer_state["step"] == phase * STEPS
        for name, array in born.optimizer_state.items():
            np.testing.assert_array_equal(array, expected[name])


def plan_of(run, number, config):
    phase = get_phase(run, number)
    return phase.transfer.plan(config, phase.config, run.seed, None)


def test_resuming_at_a_birth_changes_nothing(finished, mlxmoe, tmp_path):
    whole, _ = finished
    backend = json.loads((whole / "environment.json").read_text())["backend"]
    pieces = tmp_path / "run"
    shutil.copytree(whole, pieces)
    for step in (24, STEPS):
        shutil.rmtree(checkpoint_folder(pieces, 3, step))
    result = mlxmoe("train", "--resume", pieces, "--backend", backend)
    assert "resuming from phases/3-large-moe/checkpoints/step-0" in result.out
    expected, actual = checkpoint.load(whole), checkpoint.load(pieces)
    for name, array in expected.weights.items():
        np.testing.assert_array_equal(actual.weights[name], array)


def test_moments_are_reset_on_request(mlxmoe, tmp_path):
    directory = tmp_path / "run"
    arguments = [*TINY, "--optimizer-transfer", "reset", "--backend", "torch", "--phases", 2]
    assert mlxmoe("train", *arguments, "--out", directory).code == 0
    assert checkpoint.load(checkpoint_folder(directory, 2, 0)).optimizer_state is None
    assert checkpoint.load(checkpoint_folder(directory, 2, STEPS)).optimizer_state["step"] == STEPS
    result = mlxmoe("train", *TINY, "--optimizer-transfer", "keep", "--out", tmp_path / "other")
    assert result.code == 2
    assert "optimizer.transfer" in result.err


@pytest.mark.parametrize(("first", "second"), [("mlx", "torch"), ("torch", "mlx")])
def test_one_backend_goes_on_where_the_other_stopped(first, second, mlxmoe, tmp_path):
    directory = tmp_path / "run"
    assert mlxmoe("train", *TINY, "--backend", first, "--out", directory, "--phases", 2).code == 0
    texts = [
        mlxmoe("generate", directory, "--backend", name, "--temperature", 0, "-n", 12).out for name in (first, second)
    ]
    assert texts[0] == texts[1]
    for unfinished in list(checkpoint.complete_in(directory))[-1:]:  # lose the end of phase 2, so that moments are read
        for file in unfinished.iterdir():
            file.unlink()
        unfinished.rmdir()
    result = mlxmoe("train", "--resume", directory, "--backend", second, "--phases", 3)
    assert result.code == 0, result.err
    assert "resuming from phases/2-moe/checkpoints/step-24" in result.out
    assert f"not bit for bit: backend {second}, was {first}" in result.out
    rows = [row for row in jsonl.read(directory / "metrics.jsonl") if "validation_loss" in row]
    assert rows[-1]["phase"] == 3
    assert rows[-1]["validation_loss"] < rows[0]["validation_loss"]
    assert len({(row["phase"], row["step"]) for row in rows}) == len(rows)


def test_a_failed_boundary_stops_the_run(mlxmoe, tmp_path):
    directory = tmp_path / "run"
    strict = ["-o", "verification.max_logit_difference=1e-30"]
    result = mlxmoe("train", *TINY, *strict, "--backend", "torch", "--out", directory)
    assert result.code == 1
    assert "boundary 1-2 changed the model" in result.err
    assert not (directory / "phases" / "2-moe").exists()
    assert not json.loads((directory / "boundaries" / "1-2.json").read_text())["passed"]
    result = mlxmoe("train", "--resume", directory, "--backend", "torch", "--phases", 2, "--allow-lossy")
    assert result.code == 0
    assert json.loads((directory / "boundaries" / "1-2.json").read_text())["allowed_lossy"]
    assert (directory / "phases" / "2-moe").exists()


def test_a_zero_router_is_warned_of(mlxmoe, tmp_path):
    arguments = [*TINY, "-o", "phases.moe.router_init=zero", "--backend", "torch", "--phases", 2]
    result = mlxmoe("train", *arguments, "--out", tmp_path / "run")
    assert result.code == 0
    assert "stays dense" in " ".join(result.out.split())
