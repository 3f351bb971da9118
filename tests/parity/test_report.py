"""What `mlxmoe parity` prints, its JSON and its exit codes."""

import errno
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

import parity.compare
from parity import page, self_test, terminal
from parity.page import render
from parity.report import SCOPES, tensors_by_scope
from parity.run import ParityRequest, run

VOID = ("meta", "link", "line", "polyline")


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
        "3 of 3 models agree",
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
    logits = next(tensor for tensor in dense["tensors"] if tensor["scope"] == "model")
    assert logits["mlx"]["rmse"] > logits["floor"]["rmse"] > 0
    assert dense["propagated"]["norm"]["torch"]["rmse"] > 0
    assert report["comparisons"][1]["boundary_mlx"]["passed"]
    assert {tensor["scope"] for tensor in dense["tensors"]} == {"module", "model", "decode", "train", "half"}
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
    assert "nano, experts: layers.0.mlp: torch's error is" in result.out
    assert "mlx so far" in result.out
    assert "nano, dense:" not in result.out


def test_a_model_too_large_for_the_truth_is_compared_directly(mlxmoe, monkeypatch):
    monkeypatch.setattr(parity.compare, "REFERENCE_BYTES", 1 << 20)
    result = mlxmoe("parity", "--preset", "nano")
    assert result.code == 0
    assert "so MLX is compared with PyTorch" in result.out
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


@pytest.fixture(scope="module")
def report():
    """Small models of one architecture, with a verdict in every scope."""
    return run(ParityRequest(presets=("nano",)))


def test_files(mlxmoe, tmp_path):
    out, html = tmp_path / "parity.json", tmp_path / "parity.html"
    result = mlxmoe("parity", "--preset", "nano", "--out", out, "--html", html)
    assert result.code == 0
    assert "3 of 3 models agree" in result.out
    document, text = json.loads(out.read_text(encoding="utf-8")), html.read_text(encoding="utf-8")
    assert document["passed"]
    assert document["command"] in text
    assert text.count("<svg") == 3  # error growth of three models
    assert text.count('class="strip"') == 2 + 3  # routers of the two models with experts
    assert not re.search(r'src=|href="(?!#|data:)|url\(|@import', text)  # nothing is fetched
    well_formed(text)


def test_every_judged_tensor_stands_in_the_page(report):
    """By its name and figures, in the order of judging; half precision included."""
    shown = [[cells for table in section for cells in table] for section in tensor_tables(render(report))]
    assert len(shown) == len(report.comparisons)
    for comparison, rows in zip(report.comparisons, shown, strict=True):
        tensors = comparison.verdict.tensors
        assert {tensor.scope for tensor in tensors} >= {"module", "model", "decode", "train"}
        assert [row[:4] for row in rows] == [
            [tensor.name, *(f"{error.rmse:.1e}" for error in (tensor.mlx, tensor.torch, tensor.float32))]
            for tensor in (tensor for group in tensors_by_scope(tensors).values() for tensor in group)
        ]
        assert sorted(row[0] for row in rows) == sorted(tensor.name for tensor in tensors)
    assert any(tensor.scope == "half" for tensor in report.comparisons[0].verdict.tensors)
    assert any(row[0] == "gradient of norm.weight in fp16" for row in shown[0])


@pytest.mark.parametrize("renderer", [render, terminal.show], ids=["page", "terminal"])
def test_a_scope_that_a_renderer_does_not_know_fails_loudly(renderer, report):
    comparison = report.comparisons[0]
    tensor = replace(comparison.verdict.tensors[-1], scope="bf16")
    verdict = replace(comparison.verdict, tensors=(*comparison.verdict.tensors, tensor))
    with pytest.raises(ValueError, match="unknown scope 'bf16'"):
        renderer(replace(report, comparisons=(replace(comparison, verdict=verdict),)))


def test_every_scope_has_a_section_of_the_page_and_a_line_of_the_terminal():
    assert set(page.SECTIONS) == set(SCOPES)
    assert {"module", "model", *terminal.SCOPE_LABELS} == set(SCOPES)


def test_what_comes_from_outside_is_escaped(report):
    evil = "<img src=x onerror=alert(1)>"
    comparison = report.comparisons[0]
    tensor = replace(comparison.verdict.tensors[0], name=evil, faults=(evil,))
    verdict = replace(comparison.verdict, tensors=(tensor, *comparison.verdict.tensors[1:]))
    text = render(replace(report, command=evil, comparisons=(replace(comparison, subject=evil, verdict=verdict),)))
    assert "<img" not in text
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
    assert re.search(r'<details class="card model" id="model-0" open>', text)
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
            if tag not in VOID:
                self.open.append(tag)

        def handle_endtag(self, tag):
            if tag not in VOID:
                assert self.open.pop() == tag

    reader = Reader()
    reader.feed(text)
    assert reader.open == []


def tensor_tables(text):
    """Cells of every row of every tensor table of every model."""

    class Reader(HTMLParser):
        def __init__(self):
            super().__init__()
            self.models, self.depth, self.in_cell = [], [], False

        def handle_starttag(self, tag, attributes):
            kind = dict(attributes).get("class") or ""
            if tag == "details":
                self.depth.append(kind)
                if "model" in kind.split():
                    self.models.append([])
                elif kind == "tensors":
                    self.models[-1].append([])
            elif tag == "tr" and self.depth[-1:] == ["tensors"]:
                self.models[-1][-1].append([])
            elif tag == "td" and self.depth[-1:] == ["tensors"]:
                self.models[-1][-1][-1].append("")
                self.in_cell = True

        def handle_endtag(self, tag):
            if tag == "details":
                self.depth.pop()
            elif tag == "td":
                self.in_cell = False

        def handle_data(self, data):
            if self.in_cell and self.depth[-1:] == ["tensors"]:
                self.models[-1][-1][-1][-1] += data

    reader = Reader()
    reader.feed(text)
    return [[[row for row in table if row] for table in model] for model in reader.models]
