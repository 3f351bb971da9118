"""Wrong arguments of the public functions: one line that names the argument and its value, and nothing done."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import mlx_moe as mm

TEXTS = [f"One day a {colour} cat ran {n} miles." for n in range(20) for colour in ("red", "big", "old")]
SIZE = {"d_model": 32, "n_layers": 1, "n_heads": 2, "context_length": 16}


@pytest.fixture(scope="module")
def data():
    return mm.tokens(TEXTS, "char")


@pytest.fixture(scope="module", params=["mlx", "torch"])
def model(request, data):
    return mm.create("llama", data, **SIZE, backend=request.param)


ANY_MODEL = {
    "data": lambda m, data: mm.create("llama", "stories"),
    "seed": lambda m, data: mm.create("llama", data, seed=2**70),
    "vocab_size": lambda m, data: mm.create("llama", data, **SIZE, vocab_size=5),
    "GB": lambda m, data: mm.create("llama", d_model=16384, n_heads=64, n_layers=400),
    "name": lambda m, data: mm.load(None),
    "no checkpoint at": lambda m, data: mm.load(""),
    "tokenizer": lambda m, data: mm.tokens(TEXTS, 3),
    r"texts\[1\]": lambda m, data: mm.tokens(["a", "b\ud800"], "char"),
    r"texts\[1\] is int": lambda m, data: mm.tokens(["a", 3], "char"),
    "tokens = ": lambda m, data: mm.tokens([1, [2, 3]]),
    "token -1 ": lambda m, data: mm.tokens([-1, 2, 3]),
    "token 8589934592": lambda m, data: mm.tokens([2**33, 2, 3]),
    "'char': token ids leave it no text": lambda m, data: mm.tokens([1, 2, 3], "char"),
    "tokens = {": lambda m, data: mm.tokens({"a", "b"}),
    "validation_fraction": lambda m, data: mm.tokens(TEXTS, "char", validation_fraction=float("nan")),
    "validation_fraction = 2": lambda m, data: mm.tokens(TEXTS, "char", validation_fraction=2),
    "n_documents = 0": lambda m, data: mm.tokens(TEXTS, "char", n_documents=0),
    "preset": lambda m, data: mm.run(3),
    "option 'nonsense' of run": lambda m, data: mm.run("demo", nonsense=3),
    "data = <Data": lambda m, data: mm.run("demo", data=data),
    "overrides = 3": lambda m, data: mm.run("demo", overrides=3),
    "cannot read .*nosuch": lambda m, data: mm.run(config="nosuch.yaml"),
}
OF_A_MODEL = {
    "tokens = ": lambda m, data: m.logits([1.7]),
    r"shape \(1, 1, 2\)": lambda m, data: m.logits([[[1, 2]]]),
    "token 1099511627776": lambda m, data: m.logits([2**40]),
    "the weights lack": lambda m, data: mm.Model(m.config, {}),
    "d_model = 0": lambda m, data: mm.grow(m, 0, 0),
    "setting 'steps' of upcycle": lambda m, data: mm.upcycle(m, steps=3),
    "steps = 'x'": lambda m, data: mm.train(m, data, "x"),
    "phases.train.steps = 0": lambda m, data: mm.train(m, data, 0),
    "model = None": lambda m, data: mm.train(None, data, 1),
    "data = None": lambda m, data: mm.train(m, None, 1),
    "token 999 ": lambda m, data: mm.train(m, [1] * 1900 + [999] * 100, 1),
    "on_step = 3": lambda m, data: mm.train(m, data, 1, on_step=3),
    "'model.d_model'": lambda m, data: mm.train(m, data, 1, overrides={"model.d_model": 64}),
    "'seed'": lambda m, data: mm.train(m, data, 1, overrides={"seed": 2}),
    "need a run in a folder": lambda m, data: mm.train(m, data, 1, overrides={"lora.rank": 2}),
    "token 300 ": lambda m, data: mm.upcycle(m, router_init="centroids", text=[1, 2, 300] * 300),
    "overrides = ": lambda m, data: mm.train(m, data, 1, overrides=["a=1"]),
    "not set": lambda m, data: mm.train(m, data, 1, overrides={"optimizer.name": {1}}),
    "prompt = 3": lambda m, data: mm.generate(m, None, 3),
    "tokenizer = 'char'": lambda m, data: mm.generate(m, "char", "One"),
    "the tokenizer has 64 tokens": lambda m, data: mm.generate(m, larger_tokenizer(), "abc"),
    "max_new_tokens = -1": lambda m, data: mm.generate(m, None, "One", -1),
    "option 'nonsense' of sampling": lambda m, data: mm.generate(m, None, "One", nonsense=1),
    "source = None": lambda m, data: mm.evaluate(m, None),
    "no text": lambda m, data: mm.evaluate(m, []),
    r"source\[0\]": lambda m, data: mm.evaluate(m, [3]),
    "max_bytes = 0": lambda m, data: mm.evaluate(m, TEXTS, max_bytes=0),
    "folder = 3": lambda m, data: mm.save(m, 3),
    "'seed' = |seed = 'x'": lambda m, data: mm.parity(m, seed="x"),
}


def larger_tokenizer():
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
    return mm.tokens([letters] * 3, "char").tokenizer


def refused(call, said, *arguments):
    with pytest.raises(mm.InputError, match=said) as info:
        call(*arguments)
    assert all(len(line) < 400 for line in info.value.lines)


@pytest.mark.parametrize("said", ANY_MODEL)
def test_bad_arguments_are_named(said, data, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    refused(ANY_MODEL[said], said, None, data)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("said", OF_A_MODEL)
def test_bad_arguments_leave_the_model_as_it_was(said, model, data, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    before = model.logits([1, 2, 3])
    refused(OF_A_MODEL[said], said, model, data)
    np.testing.assert_array_equal(model.logits([1, 2, 3]), before)
    assert list(tmp_path.iterdir()) == []


def test_an_error_inside_mlx_leaves_the_model_as_it_was(data):
    model = mm.create("llama", data, **SIZE, backend="mlx")
    before = model.logits([1, 2, 3])
    with pytest.raises(ValueError, match="matmul"):
        model._trainer.logits(np.zeros((1, 2, 3), np.int32))
    np.testing.assert_array_equal(model.logits([1, 2, 3]), before)


def test_numpy_numbers_paths_and_generators_are_taken(model, data, tmp_path):
    result = mm.train(
        model, (text for text in TEXTS), np.int64(2), learning_rate=np.float32(1e-3), batch_size=np.int32(4),
        log_every=np.int64(1), seed=np.int64(3), overrides={"optimizer.eps": np.float32(1e-8)},
    )  # fmt: skip
    assert [row["step"] for row in result.metrics if "loss" in row] == [1, 2]
    assert len(mm.generate(model, None, "One", np.int64(2))) >= 3
    assert mm.tokens(np.array(TEXTS), "char").train.size == data.train.size
    data.tokenizer.save(tmp_path)
    assert mm.tokens(TEXTS, Path(tmp_path)).train.size == data.train.size


def test_a_callback_may_change_its_row(model, data):
    assert mm.train(model, data, 2, log_every=1, on_step=lambda row: row.clear()).metrics


def fill(model, value):
    """Set all values of the first weight, by hand."""
    if model.backend == "torch":
        next(iter(model.module.parameters())).data.fill_(value)
    else:
        import mlx.core as mx
        from mlx.utils import tree_flatten

        name, array = tree_flatten(model.module.parameters())[0]
        model.module.load_weights([(name, mx.full(array.shape, value))], strict=False)


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_a_model_that_is_not_finite_is_neither_saved_nor_certified(backend, data, tmp_path):
    model = mm.create("llama", data, **SIZE, backend=backend)
    fill(model, float("nan"))
    for call in (mm.parity, lambda model: mm.save(model, tmp_path / "saved")):
        refused(call, "NaN or Inf", model)
    with pytest.raises(mm.Error, match="logits by nan"):
        mm.upcycle(model)
    with pytest.raises(mm.Error, match="take another model"):
        mm.train(model, data, 2)
    assert not (tmp_path / "saved").exists()


def test_parity_of_a_model_with_dropout(data):
    assert mm.parity(mm.create("llama", data, **SIZE, dropout=0.2)).passed


def test_a_run_is_resumed_from_python(tmp_path):
    settings = {f"model.{name}": value for name, value in SIZE.items()} | {"data.n_documents": 60}
    options = {"data": "stories", "tokenizer": "char", "steps": 2, "phases": 1}
    first = mm.run("demo", overrides=settings | {"training.eval_sequences": 2}, out=tmp_path / "run", **options)
    assert mm.run(resume=str(first.folder)).metrics == first.metrics


def test_a_missing_tracker_leaves_no_folder(model, data, tmp_path):
    if find_spec("wandb") is not None:
        pytest.skip("wandb is installed")
    with pytest.raises(mm.InputError, match="wandb"):
        mm.train(model, data, 2, out=tmp_path / "run", overrides={"training.tracker": "wandb"})
    assert not (tmp_path / "run").exists()
