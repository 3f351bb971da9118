"""The public face: what a notebook does, on both backends."""

import subprocess
import sys

import numpy as np
import pytest

import mlx_moe as mm
from mlx_moe.storage import checkpoint

TEXTS = [f"The {colour} cat sat on the mat and saw {n} birds." for colour in ("red", "old", "shy") for n in range(70)]
SIZE = {"d_model": 32, "n_layers": 2, "n_heads": 2, "context_length": 32}


@pytest.fixture(params=["mlx", "torch"])
def backend(request):
    return request.param


@pytest.fixture
def data():
    return mm.tokens(TEXTS[:200], "char", validation_fraction=0.1)


@pytest.fixture
def model(data, backend):
    return mm.create("llama", data, backend=backend, **SIZE)


def test_ten_lines_from_texts_to_a_mixture(data, model):
    rows = []
    dense = mm.train(model, data, steps=30, learning_rate=3e-3, log_every=5, on_step=rows.append)
    assert [row["step"] for row in rows] == [1, 5, 10, 15, 20, 25, 30]
    assert dense.validation_loss < dense.metrics[0]["validation_loss"]
    moe, certificate = mm.upcycle(dense.model, n_experts=4, top_k=2)
    assert certificate.passed
    assert moe.parameters.total > dense.model.parameters.total
    big, certificate = mm.grow(moe, d_model=48, n_layers=3)
    assert certificate.passed
    result = mm.train(big, data, steps=5)
    text = mm.generate(result.model, data.tokenizer, "The red", 20, temperature=0)
    assert text.startswith("The red")
    assert mm.evaluate(result.model, TEXTS[200:])["bits_per_byte"] > 0
    assert result.model.lineage[1:] == (
        "trained for 30 steps",
        f"upcycled to {moe.config.display_name}",
        f"grown to {big.config.display_name}",
        "trained for 5 steps",
    )


def test_a_model_that_is_given_stays_as_it_was(data, model):
    before = model.weights()
    mm.train(model, data, steps=2, learning_rate=1e-2)
    mm.upcycle(model)
    mm.grow(model, d_model=48)
    for name, array in model.weights().items():
        np.testing.assert_array_equal(array, before[name])


def test_training_writes_nothing_without_a_folder(data, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mm.train(model, data, steps=2)
    assert list(tmp_path.iterdir()) == []


def test_the_module_is_the_frameworks_own_and_may_be_changed(model, backend, tmp_path):
    if backend == "torch":
        import torch

        assert isinstance(model.module, torch.nn.Module)
        with torch.no_grad():
            model.module.norm.weight.mul_(2)
    else:
        import mlx.nn as nn

        assert isinstance(model.module, nn.Module)
        model.module.norm.weight = model.module.norm.weight * 2
    saved = model.save(tmp_path / "changed")
    np.testing.assert_array_equal(checkpoint.load(saved).weights["norm.weight"], 2 * np.ones(32, np.float32))
    again, tokenizer = mm.load(saved, backend)
    np.testing.assert_array_equal(again.logits([1, 2, 3]), model.logits([1, 2, 3]))
    assert tokenizer is not None


def test_a_folder_of_a_training_is_a_run(data, model, mlxmoe, tmp_path):
    whole = mm.train(model, data, steps=6, out=tmp_path / "whole", overrides={"training.checkpoint_every": 3})
    assert whole.folder == tmp_path / "whole"
    assert mlxmoe("report", tmp_path / "whole").code == 0
    in_memory = mm.train(model, data, steps=6)
    for name, array in in_memory.model.weights().items():
        np.testing.assert_array_equal(array, whole.model.weights()[name])
    (last,) = [path for path in checkpoint.complete_in(tmp_path / "whole") if path.name == "step-6"]
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    resumed = mlxmoe("train", "--resume", tmp_path / "whole")
    assert resumed.code == 0, resumed.err
    again, _ = mm.load(tmp_path / "whole", model.backend)
    for name, array in again.weights().items():
        np.testing.assert_array_equal(array, whole.model.weights()[name])


def test_a_run_of_phases(tmp_path, backend, mlxmoe):
    overrides = {f"model.{name}": value for name, value in SIZE.items()} | {"data.n_documents": 60}
    overrides |= {"phases.moe.n_experts": 2, "training.batch_size": 2, "training.eval_sequences": 4}
    done = mm.run(
        "demo", overrides=overrides, tokenizer="char", steps=2, phases="2", backend=backend, out=tmp_path / "run"
    )
    assert [row["event"] for row in done.history] == ["phase", "boundary", "phase"]
    assert done.model(backend).config.moe.n_experts == 2


def test_named_sources_and_ids(model):
    named = mm.tokens("stories", "char", n_documents=30)
    assert len(named.train) > len(named.validation) > 0
    ids = np.arange(2000) % model.config.vocab_size
    assert mm.train(model, ids, steps=1).validation_loss > 0
    documents = mm.tokens([[1, 2, 3] * 50, [4, 5, 6] * 50])
    assert len(documents.train) + len(documents.validation) == 300


REFUSED = {
    "a size": (lambda model, data: mm.create("nano", n_layers=0), "n_layers = 0"),
    "an architecture": (lambda model, data: mm.create("lama"), "did you mean 'llama'"),
    "a learning rate": (lambda model, data: mm.train(model, data, 2, learning_rate=-1), "learning_rate = -1"),
    "a setting": (lambda model, data: mm.train(model, data, 2, overrides={"optimizer.nam": "muon"}), "optimizer.nam"),
    "tokens of another model": (lambda model, data: mm.train(model, np.full(500, 9999), 2), "token 9999"),
    "too few tokens": (lambda model, data: mm.train(model, [1, 2, 3], 2), "do not fill one window"),
    "a token": (lambda model, data: model.logits([9999]), "token 9999 is not in the model.s vocabulary of"),
    "a long text": (lambda model, data: model.logits([1] * 33), "context holds 32"),
    "experts": (lambda model, data: mm.upcycle(model, n_experts=2, top_k=3), "top_k 3 is more than n_experts 2"),
    "a smaller model": (lambda model, data: mm.grow(model, d_model=16), "cannot shrink d_model"),
    "ids in a folder": (lambda model, data: mm.train(model, [1, 2] * 999, 2, out="x"), "needs its text"),
    "texts without a tokenizer": (lambda model, data: mm.tokens(["a", "b"]), "need a tokenizer"),
    "sampling": (lambda model, data: mm.generate(model, None, "The", 5, temperature=-1), "temperature -1"),
    "nothing there": (lambda model, data: mm.load("nowhere/at/all"), "nowhere/at/all"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_errors_are_one_class_with_one_line(case, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call, said = REFUSED[case]
    model = mm.create("llama", data, backend="torch", **SIZE)
    with pytest.raises(mm.Error, match=said) as caught:
        call(model, data)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_lossy_transfer_needs_leave(data):
    model = mm.create("llama", data, backend="torch", **SIZE)
    _, certificate = mm.upcycle(model, noise=0.5)
    assert not certificate.passed


def test_a_loss_that_is_not_finite_is_an_error(data):
    model = mm.create("llama", data, backend="torch", **SIZE)
    with pytest.raises(mm.Error, match="nothing was saved, because no folder was named"):
        mm.train(model, data, steps=300, learning_rate=1e25, log_every=1, overrides={"optimizer.max_grad_norm": 1e30})


def test_parity_of_a_model(data):
    comparison = mm.parity(mm.create("llama", data, **SIZE))
    assert comparison.passed


def test_the_package_loads_nothing_heavy():
    code = "import sys, mlx_moe; print(*(n for n in ('torch', 'mlx', 'numpy', 'pydantic') if n in sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []
    assert set(mm.__all__) <= set(dir(mm))
    for name in mm.__all__:
        assert getattr(mm, name).__doc__
