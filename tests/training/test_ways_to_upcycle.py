"""Runs that upcycle some layers, into parts of copies, beside a shared expert, with routers on centroids."""

import json

import numpy as np
import pytest
from support.short_runs import AfterStep, assert_same_run, checkpoint_folder, short_run, start

from mlx_moe.analysis.plots import expert_load
from mlx_moe.analysis.report import _data
from mlx_moe.analysis.run_reader import read_record
from mlx_moe.storage import checkpoint, jsonl
from mlx_moe.training.run import open_run

WAYS = [
    *("model.n_layers=4", "phases.large_moe.n_layers=6", "phases.moe.every=2", "phases.moe.granularity=2"),
    *("phases.moe.shared=true", "phases.moe.router_init=centroids"),
]


@pytest.fixture(scope="module", params=["mlx", "torch"])
def finished(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param) / "run"
    start(short_run(*WAYS), directory, request.param)
    return directory, request.param


def test_both_boundaries_are_lossless(finished):
    directory, _ = finished
    for name in ("1-2", "2-3"):
        certificate = json.loads((directory / "boundaries" / f"{name}.json").read_text())
        assert certificate["passed"]
        assert certificate["max_logit_difference"] < 1e-5
    moe, large = (checkpoint.load(checkpoint.latest(directory / "phases" / name / "checkpoints")).config
                  for name in ("2-moe", "3-large-moe"))  # fmt: skip
    assert (moe.expert_layers, moe.moe.n_experts, moe.moe.top_k) == ((1, 3), 8, 4)
    assert (moe.moe.d_ff, moe.moe.shared_d_ff) == (moe.d_ff // 2, moe.d_ff)
    assert (large.expert_layers, large.moe.d_ff, large.moe.shared_d_ff) == ((2, 5), large.d_ff // 2, large.d_ff)


def test_the_load_of_every_layer_with_experts_is_logged(finished):
    directory, _ = finished
    rows = [row for row in jsonl.read(directory / "metrics.jsonl") if row["phase"] > 1 and "expert_load" in row]
    assert {np.shape(row["expert_load"]) for row in rows} == {(2, 8)}
    assert all(row["loss"] < 5 for row in rows)


def test_parts_of_a_copy_part_ways(finished):
    directory, _ = finished
    trained = checkpoint.load(checkpoint.latest(directory / "phases" / "2-moe" / "checkpoints"))
    born = checkpoint.load(checkpoint_folder(directory, 2, 0))
    for weights, same in ((born.weights, True), (trained.weights, False)):
        rows = weights["layers.3.mlp.router.weight"]
        assert np.array_equal(rows[0], rows[1]) is same


def test_resumed_it_is_the_same(finished, tmp_path):
    directory, backend = finished
    run = short_run(*WAYS)
    stopping = AfterStep((2, 4), lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        start(run, tmp_path / "run", backend, stopping)
    start(open_run(tmp_path / "run"), tmp_path / "run", backend)
    assert_same_run(directory, tmp_path / "run")


def test_reports_name_the_layers(finished, mlxmoe):
    directory, backend = finished
    result = mlxmoe("experts", directory, "--backend", backend, "--sequences", "4")
    assert result.code == 0, result.err
    assert "\n5.7 " in result.out
    found = json.loads((directory / "experts.json").read_text())
    assert [layer["layer"] for layer in found["checkpoints"][-1]["layers"]] == [2, 5]
    if backend == "torch":
        record = read_record(directory)
        assert [loads["numbers"] for loads in _data(record)["loads"]] == [(1, 3), (2, 5)]
        assert [text.get_text() for axes in expert_load(record).axes for text in axes.get_yticklabels()][:4] == [
            "layer 1", "layer 3", "layer 2", "layer 5"
        ]  # fmt: skip
