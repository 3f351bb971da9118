"""What `mlxmoe parity` prints, its JSON and its exit codes."""

import json

import pytest

import parity.compare
from parity import self_test


def test_a_table_of_errors(mlxmoe):
    result = mlxmoe("parity", "--preset", "nano")
    assert result.code == 0, result.out + result.err
    for text in (
        "nano, dense",
        "nano, experts",
        "nano, grown",
        "float32",
        "floor",
        "limit 2",
        "3 models, all the same",
    ):
        assert text in result.out


def test_json_says_how_to_get_it_again(mlxmoe):
    arguments = ("parity", "--preset", "gpt2", "--seed", 3, "--json")
    result = mlxmoe(*arguments)
    report = json.loads(result.out)
    assert result.code == 0
    assert report["command"] == "mlxmoe parity --preset gpt2 --seed 3"
    assert {"torch", "mlx", "numpy"} <= report["libraries"].keys()
    dense = report["comparisons"][0]
    names = [tensor["name"] for tensor in dense["tensors"]]
    assert names[0] == "embed_tokens"
    assert names[-1] == "lm_head"
    assert dense["tensors"][-1]["mlx"]["rmse"] > dense["tensors"][-1]["floor"]["rmse"] > 0
    assert dense["propagated"]["norm"]["torch"]["rmse"] > 0
    assert report["comparisons"][1]["boundary_mlx"]["passed"]


def test_the_first_wrong_module_is_said(mlxmoe, monkeypatch):
    import torch_ref.moe

    gate = torch_ref.moe.gate
    monkeypatch.setattr(torch_ref.moe, "gate", lambda logits, experts: gate(1.001 * logits, experts))
    result = mlxmoe("parity", "--preset", "nano")
    assert result.code == 1
    assert "nano, experts: layers.0.mlp: torch is" in result.out
    assert "nano, dense:" not in result.out


def test_a_model_too_large_for_the_truth_is_compared_directly(mlxmoe, monkeypatch):
    monkeypatch.setattr(parity.compare, "TRUTH_BYTES", 1 << 20)
    result = mlxmoe("parity", "--preset", "nano")
    assert result.code == 0
    assert "MLX against PyTorch instead" in result.out
    comparison = json.loads(mlxmoe("parity", "--preset", "nano", "--json").out)["comparisons"][0]
    assert comparison["backends"]["passed"]
    assert "GiB" in comparison["without_truth"]


@pytest.mark.parametrize("missed", [False, True])
def test_the_mutation_score(missed, mlxmoe, monkeypatch):
    harmless = self_test.Mutation("nothing at all", "llama")
    mutations = (*self_test.MUTATIONS[:2], *([harmless] if missed else []))
    monkeypatch.setattr(self_test, "MUTATIONS", mutations)
    monkeypatch.setattr(self_test, "SIZED", {"RoPE θ": self_test.SIZED["RoPE θ"]})
    result = mlxmoe("parity", "--self-test")
    assert result.code == int(missed)
    assert f"2 of {len(mutations)} caught" in result.out
    assert ("MISSED" in result.out) == missed
    assert "1e-05 of itself" in result.out
    report = json.loads(mlxmoe("parity", "--self-test", "--json").out)
    assert report["caught"] == 2
    assert report["smallest_caught"] == {"RoPE θ": pytest.approx(1e-5)}
    assert [fault["caught"] for fault in report["faults"]] == [True, True, *([False] if missed else [])]
