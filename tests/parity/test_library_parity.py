"""mlx-lm against transformers on any folder: what they disagree on is found, with its cause; what they share passes."""

import json
import os
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from support.any_models import save
from support.small_models import rough_weights, small_model
from support.their_weights import llama_config, llama_weights
from transformers import LlamaConfig, LlamaForCausalLM

import parity.libraries.mlx_lm
import parity.libraries.transformers
from mlx_moe.errors import InputError
from parity.config_key_usage import alternatives, find_key_usage, leaves, repairs, with_value
from parity.library_comparison import LibraryComparison
from parity.library_parity import compare_model
from parity.numpy_model import NumpyModel

SMOLLM2 = Path(os.environ.get("SMOLLM2", "smollm2"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a model by its name, made once."""
    root = tmp_path_factory.mktemp("models")
    return lambda name: root / name if (root / name).is_dir() else save(name, root / name)


@pytest.mark.parametrize("name", ["llama", "olmoe", "mixtral"])
def test_what_agrees_passes(name, folder):
    report = compare_model(folder(name))
    assert report.passed, report
    assert [way.name for way in report.measured.ways] == [
        "prefill",
        "one token at a time",
        "in chunks",
        "left padding",
        "one row at a time",
    ]
    assert report.measured.judged == 2 * 64
    assert len(report.measured.modules) > 15
    assert max(way.floor.rmse for way in report.measured.ways) < 1e-7
    assert all(usage.ignored_by == "mlx-lm" for usage in report.key_usage)
    assert report.causes == ()


@pytest.mark.parametrize(
    ("name", "cause", "repair"),
    [
        ("llama-theta", "rope_parameters.rope_theta = 50000.0: mlx-lm does not read it, and takes 10000", True),
        ("qwen2_moe-theta", "rope_parameters.rope_theta = 50000.0: mlx-lm does not read it, and takes 1000000", True),
        ("mistral-window", "sliding_window = 8: mlx-lm ignores it; without it, they agree", False),
        ("mixtral-window", "sliding_window = 8: mlx-lm ignores it; without it, they agree", False),
    ],
)
def test_what_is_ignored_is_the_cause(name, cause, repair, folder):
    report = compare_model(folder(name))
    assert report.exit_code == 1
    assert len(report.causes) == 1
    assert report.causes[0].startswith(cause)
    assert report.repair == ('with "rope_theta": 50000.0 in config.json, it passes' if repair else "")
    assert report.measured.first_module.name == "model.layers.0.self_attn"
    assert report.measured.ways[0].ratios[0] > 1000


@pytest.mark.parametrize(
    ("name", "needs", "repair"),
    [
        (
            "qwen3_moe",
            "num_experts, rope_theta",
            'with "num_experts": 4, "rope_theta": 10000.0 in config.json, it passes',
        ),
        ("gpt2", "n_ctx", ""),
    ],
)
def test_what_does_not_open_is_said(name, needs, repair, folder):
    report = compare_model(folder(name))
    assert report.exit_code == 2
    assert report.problem.startswith("mlx-lm fails with TypeError")
    assert f"it needs {needs}, which config.json does not have" in report.problem
    assert report.repair == repair


def test_the_command(folder, mlxmoe, tmp_path):
    arguments = ("parity", "--model", folder("llama-theta"), "--html", tmp_path / "page.html")
    result = mlxmoe(*arguments)
    assert result.code == 1
    for text in ("cause: rope_parameters.rope_theta", "prefill", "first in model.layers.0.self_attn", "DIFFERS"):
        assert text in result.out
    assert "rope_parameters.rope_theta" in (tmp_path / "page.html").read_text()
    model = json.loads(mlxmoe(*arguments, "--json").out)["model"]
    assert model["causes"]
    assert len(model["config_sha256"]) == len(model["weights_sha256"]["model.safetensors"]) == 64
    assert mlxmoe("parity", "--model", folder("gpt2")).code == 2


def test_a_weight_that_is_off_is_found_in_its_module(folder, tmp_path):
    """Of mlx-lm's side alone: it reads another folder."""
    broken = shutil.copytree(folder("llama"), tmp_path / "broken")
    weights = safetensors.numpy.load_file(broken / "model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    weights[f"{name}.weight"] = weights[f"{name}.weight"].astype(np.float16).astype(np.float32)
    safetensors.numpy.save_file(weights, broken / "model.safetensors", {"format": "pt"})
    library = parity.libraries.transformers.LibraryModel
    tokens = np.random.default_rng(0).integers(0, 96, (2, 64)).astype(np.int32)
    comparison = LibraryComparison(library(folder("llama")), library(folder("llama"), exact=True), tokens)
    measured = comparison.measure(parity.libraries.mlx_lm.LibraryModel(broken))
    assert not measured.passed
    assert measured.first_module.name == name
    assert "std" in str(measured.first_module)


@pytest.fixture(scope="module")
def tied(folder, tmp_path_factory):
    """Routers of which all experts tie, but for the last bit of some weights."""
    tied = shutil.copytree(folder("mixtral"), tmp_path_factory.mktemp("tied") / "mixtral")
    rng = np.random.default_rng(0)

    def nearly_equal(gate_ED):
        gate_ED[:] = gate_ED[0]
        gate_ED[rng.random(gate_ED.shape) < 0.3] *= np.float32(1 + 1e-7)

    edit(tied, "gate.weight", nearly_equal)
    return tied


def test_at_ties_all_is_judged_with_the_truths_experts(tied):
    report = compare_model(tied)
    assert report.passed, report
    assert report.measured.judged == 2 * 64
    assert report.measured.flips
    assert any("greedy generation" in remark for remark in report.measured.remarks)


def test_a_library_that_cannot_be_told_is_judged_up_to_a_tie(tied, folder, monkeypatch):
    monkeypatch.setattr(parity.libraries.mlx_lm, "_choosing", lambda routes: nullcontext([]))
    report = compare_model(folder("mixtral"))
    assert report.passed, report
    assert "0 of 128 positions" in report.measured.remarks[0]
    with pytest.raises(InputError, match="tie up to rounding from the first token"):
        compare_model(tied)


def test_other_experts_without_a_tie_are_counted(folder, tmp_path):
    """Of mlx-lm's side alone, whose routers know two experts by each other's names."""
    broken = shutil.copytree(folder("mixtral"), tmp_path / "broken")
    edit(broken, "gate.weight", lambda gate_ED: gate_ED.__setitem__([0, 1], gate_ED[[1, 0]]))
    library = parity.libraries.transformers.LibraryModel
    tokens = np.random.default_rng(0).integers(0, 96, (2, 64)).astype(np.int32)
    comparison = LibraryComparison(library(folder("mixtral")), library(folder("mixtral"), exact=True), tokens)
    measured = comparison.measure(parity.libraries.mlx_lm.LibraryModel(broken))
    assert not measured.passed
    assert measured.misrouted > 50


def test_a_tensor_in_no_file_is_said(folder, tmp_path):
    broken = shutil.copytree(folder("llama"), tmp_path / "broken")
    weights = safetensors.numpy.load_file(broken / "model.safetensors")
    del weights["model.norm.weight"]
    safetensors.numpy.save_file(weights, broken / "model.safetensors", {"format": "pt"})
    report = compare_model(broken)
    assert report.exit_code == 2
    assert "model.norm.weight" in report.problem
    assert report.parameters == ("model.norm.weight: in no file, so transformers initializes it at random",)


def test_transformers_in_float64_is_float64_throughout(tmp_path):
    """It agrees with the oracle to the last digits; `.double()` alone does not."""
    config = small_model("llama", rope_theta=5e4, n_kv_heads=2)
    weights, tokens = rough_weights(config, 1), np.arange(64, dtype=np.int32).reshape(2, 32)
    model = LlamaForCausalLM(LlamaConfig(**llama_config(config)))
    model.load_state_dict({name: torch.tensor(array) for name, array in llama_weights(config, weights).items()})
    model.save_pretrained(tmp_path)
    reference = NumpyModel(config, weights)(tokens).logits_BTV
    found = parity.libraries.transformers.LibraryModel(tmp_path, exact=True).logits(tokens)
    assert np.abs(found - reference).max() < 1e-12
    with torch.no_grad():
        plain = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)(torch.from_numpy(tokens).long())
    assert np.abs(plain.logits.numpy() - reference).max() > 1e-8
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "no config.json"),
        ({"config.json": "{"}, "config.json"),
        ({"config.json": '{"model_type": "llama"}'}, "no model.safetensors"),
    ],
)
def test_no_model(files, said, mlxmoe, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    result = mlxmoe("parity", "--model", tmp_path)
    assert result.code == 2
    assert said in result.err
    with pytest.raises(InputError):
        compare_model(tmp_path)


def test_a_family_that_mlx_lm_does_not_know(folder, tmp_path):
    unknown = shutil.copytree(folder("llama"), tmp_path / "unknown")
    config = json.loads((unknown / "config.json").read_text()) | {
        "model_type": "opt",
        "architectures": ["OPTForCausalLM"],
    }
    (unknown / "config.json").write_text(json.dumps(config))
    report = compare_model(unknown)
    assert report.exit_code == 2
    assert "mlx-lm does not know this model" in report.problem


def test_keys_are_changed_one_by_one():
    config = {"model_type": "x", "size": 3, "rope": {"theta": 2.0, "kind": "plain"}, "off": None, "flag": False}

    def one(changed):
        if changed["rope"]["kind"] != "plain":
            raise ValueError
        return np.array([changed["size"], changed["rope"]["theta"]])

    def other(changed):
        return np.array([changed["size"], changed["flag"]])

    found = {(usage.key, usage.ignored_by) for usage in find_key_usage(config, one, other)}
    assert found == {("rope.theta", "mlx-lm"), ("rope.kind", "mlx-lm"), ("flag", "transformers")}
    assert next(leaves(config)) == (("size",), 3)
    assert with_value(config, ("rope", "theta"), ...)["rope"] == {"kind": "plain"}
    assert alternatives(True) == [False]
    assert alternatives(None) == []
    assert 2 in alternatives(4096)


def test_repairs():
    config = {"rope": {"theta": 5.0, "kind": "plain"}, "size": 3}
    fields = {"theta": 1.0, "kind": "plain", "experts": ..., "size": 7, "unknown": None}
    assert repairs(config, fields, ..., {"experts": 4}.get) == {"theta": 5.0, "experts": 4}


@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="SmolLM2-135M is not here; SMOLLM2 names its folder")
@pytest.mark.parametrize("repaired", [False, True])
def test_smollm2(repaired, tmp_path):
    folder = tmp_path / "smollm2"
    folder.mkdir()
    for file in SMOLLM2.iterdir():
        shutil.copyfile(file, folder / file.name)
    if repaired:
        config = json.loads((folder / "config.json").read_text()) | {"rope_theta": 1e5}
        (folder / "config.json").unlink()
        (folder / "config.json").write_text(json.dumps(config))
    report = compare_model(folder)
    assert report.passed == repaired, report
    if not repaired:
        assert report.causes == ("rope_parameters.rope_theta = 100000.0: mlx-lm does not read it, and takes 10000",)
        assert report.repair == 'with "rope_theta": 100000.0 in config.json, it passes'


def edit(folder, ending, change):
    """The tensors of a folder whose names end so."""
    weights = safetensors.numpy.load_file(folder / "model.safetensors")
    for name in weights:
        if name.endswith(ending):
            change(weights[name])
    safetensors.numpy.save_file(weights, folder / "model.safetensors", {"format": "pt"})
