"""What `mlxmoe parity` prints, its JSON and its exit codes."""

import errno
import json
import re
from html.parser import HTMLParser
from pathlib import Path

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
    assert {"lm_head", "gradient of norm.weight", "norm.weight after a step", "logits in chunks"} <= set(names)
    logits = next(tensor for tensor in dense["tensors"] if tensor["scope"] == "whole")
    assert logits["mlx"]["rmse"] > logits["floor"]["rmse"] > 0
    assert dense["propagated"]["norm"]["torch"]["rmse"] > 0
    assert report["comparisons"][1]["boundary_mlx"]["passed"]
    assert {tensor["scope"] for tensor in dense["tensors"]} == {"own", "whole", "way", "step", "half"}
    for comparison, n_claims in zip(report["comparisons"], (0, 5, 3), strict=True):
        assert len(comparison["weights_sha256"]) == 64
        assert [claim["passed"] for claim in comparison["claims"]] == [True] * n_claims
    assert all(margin["smallest"] > margin["error"] for margin in report["comparisons"][1]["routing_margins"])


def test_the_first_wrong_module_is_said(mlxmoe, monkeypatch):
    import torch_ref.moe

    gate = torch_ref.moe.gate_weights
    monkeypatch.setattr(torch_ref.moe, "gate_weights", lambda logits, experts: gate(1.001 * logits, experts))
    result = mlxmoe("parity", "--preset", "nano")
    assert result.code == 1
    assert "nano, experts: layers.0.mlp: torch is" in result.out
    assert "all so far" in result.out
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
def test_the_mutation_score(missed, mlxmoe, monkeypatch, tmp_path):
    harmless = self_test.Mutation("nothing at all", "llama")
    mutations = (*self_test.MUTATIONS[:2], *([harmless] if missed else []))
    monkeypatch.setattr(self_test, "MUTATIONS", mutations)
    monkeypatch.setattr(self_test, "SIZED", {"RoPE θ": self_test.SIZED["RoPE θ"]})
    result = mlxmoe("parity", "--preset", "nano", "--self-test", "--out", tmp_path / "report.json")
    assert result.code == int(missed)
    assert f"2 of {len(mutations)} caught" in result.out
    assert ("MISSED" in result.out) == missed
    assert "1e-05 of itself" in result.out
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["passed"] == (not missed)
    assert report["caught"] == 2
    assert report["smallest_caught"] == {"RoPE θ": pytest.approx(1e-5)}
    assert [fault["caught"] for fault in report["faults"]] == [True, True, *([False] if missed else [])]


def test_files(mlxmoe, tmp_path):
    out, html = tmp_path / "parity.json", tmp_path / "parity.html"
    result = mlxmoe("parity", "--preset", "nano", "--out", out, "--html", html)
    assert result.code == 0
    assert "3 models, all the same" in result.out
    document, text = json.loads(out.read_text(encoding="utf-8")), html.read_text(encoding="utf-8")
    assert document["passed"]
    assert document["command"] in text
    assert text.count("<svg") == 3 + 2  # error growth of three models, margins of the two with experts
    assert not re.search(r"(src|href)=|url\(|@import|<script", text)
    well_formed(text)


def test_a_disk_that_is_full_is_said(mlxmoe, tmp_path, monkeypatch):
    def full(path, text, encoding):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    result = mlxmoe("parity", "--preset", "nano", "--out", tmp_path / "parity.json")
    assert result.code == 2
    assert "No space left on device" in result.err
    assert not list(tmp_path.iterdir())


def test_a_page_of_what_differs(mlxmoe, monkeypatch, tmp_path):
    import torch_ref.layers

    monkeypatch.setitem(torch_ref.layers.ACTIVATIONS, "gelu_tanh", lambda x: x * float("nan"))
    assert mlxmoe("parity", "--preset", "gpt2", "--html", tmp_path / "page.html").code == 1
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "DIFFERS" in text
    assert "∞" in text
    assert "<details open>" in text
    well_formed(text)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "x", "--preset", "nano"], "--model compares mlx-lm with transformers"),
        (["--html", "/dev/null"], "/dev/null is no regular file"),
        (["--out", "x" * 300], "File name too long"),
        (["--out", "same", "--html", "same"], "--out same and --html same need two files side by side"),
        (["--out", "a", "--html", "a/b"], "need two files side by side"),
        (["--out", "same", "--html", "link"], "need two files side by side"),
    ],
)
def test_bad_arguments(arguments, said, mlxmoe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("same")
    result = mlxmoe("parity", *arguments)
    assert result.code == 2
    assert said in result.err


def well_formed(text):
    """Every tag is closed, in order."""

    class Reader(HTMLParser):
        def __init__(self):
            super().__init__()
            self.open = []

        def handle_starttag(self, tag, attributes):
            if tag not in ("meta", "line", "circle", "polyline"):
                self.open.append(tag)

        def handle_endtag(self, tag):
            if tag not in ("line", "circle", "polyline"):
                assert self.open.pop() == tag

    reader = Reader()
    reader.feed(text)
    assert reader.open == []
