"""Runs that start from a model that is there already: a published one, or a checkpoint of ours."""

import json
import random
import re
import shutil
import signal
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.published_models import edit_config, save, save_tokenizer
from support.short_runs import LENGTHS, STEPS, AfterStep, assert_same_run, checkpoint_folder, start

from mlx_moe.errors import InputError
from mlx_moe.hub.models import open_model
from mlx_moe.storage import checkpoint, jsonl
from mlx_moe.training.console import Console
from mlx_moe.training.from_checkpoint import start_from
from mlx_moe.training.run import open_run
from mlx_moe.training.stopping import TrainingStopped

SHORT = [
    *("data.validation_fraction=0.2", "phases.moe.n_experts=4", "phases.large_moe.d_model=48"),
    *("phases.large_moe.n_layers=3", "training.batch_size=4", "training.log_every=1", "training.eval_every=3"),
    *("training.checkpoint_every=5", "training.eval_sequences=8", *LENGTHS),
    *(f"phases.{phase}.learning_rate=3e-3" for phase in ("dense", "moe", "large_moe")),
]
OPTIONS = [word for override in SHORT for word in ("-o", override)]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Words that follow each other by a fixed step, which differs from line to line."""
    draw, file = random.Random(0), tmp_path_factory.mktemp("text") / "text.jsonl"
    lines = [[f"w{(draw.randrange(93) + draw.choice((1, 2)) * i) % 93}" for i in range(40)] for _ in range(200)]
    file.write_text("".join(json.dumps({"text": " ".join(line)}) + "\n" for line in lines))
    return file


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    for name in ("llama-tied", "mixtral", "gpt2"):
        save(name, folder / name)
        save_tokenizer(folder / name)
    return folder


def losses(directory):
    rows = [row for row in jsonl.read(directory / "history.jsonl") if row["event"] == "phase"]
    return {row["phase"]: (row["first_validation_loss"], row["last_validation_loss"]) for row in rows}


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_upcycled_at_once_and_grown(backend, published, text, mlxmoe, tmp_path):
    run, source = tmp_path / "run", published / "llama-tied"
    arguments = ["--from", source, "--phases", "2,3", "--data", text, "--backend", backend]
    result = mlxmoe("train", *arguments, *OPTIONS, "--out", run)
    assert result.code == 0, result.err
    assert f"llama-tied, from {source}" in result.out
    found = losses(run)
    assert list(found) == [2, 3]
    assert all(last < first for first, last in found.values())
    for name in ("1-2", "2-3"):
        assert json.loads((run / "boundaries" / f"{name}.json").read_text())["passed"]
    born = checkpoint.load(checkpoint_folder(run, 2, 0))
    assert born.optimizer_state is None
    assert born.state.lineage == ("llama-tied", "upcycled to 2L-4H2KV-32D-RoPE-RMS-SwiGLU-PreNorm-4E2")
    assert checkpoint.load(run).state.lineage == (
        *born.state.lineage,
        "trained for 10 steps",
        "grown to 3L-6H3KV-48D-RoPE-RMS-SwiGLU-PreNorm-4E2",
    )
    assert mlxmoe("export", run, tmp_path / "out").code == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| lineage | {', '.join(checkpoint.load(run).state.lineage)} |" in card
    assert "by its lineage, then trained for 8 steps" in card
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == (source / "chat_template.jinja").read_text()
    if backend == "mlx":
        return
    for command in (["experts", run], ["report", run], ["plot", run], ["plan", "--config", run / "config.yaml"]):
        result = mlxmoe(*command)
        assert result.code == 0, result.err
    assert "1-dense" not in result.out
    page = (run / "report.html").read_text()
    assert "Llama-tied, upcycled to 2L-4H2KV-32D" in page
    assert "was not begun" not in page


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_adapters_learn_and_end_in_a_model_like_any_other(backend, published, text, mlxmoe, tmp_path):
    run = tmp_path / "run"
    arguments = ["--from", published / "llama-tied", "--phases", "2,3", "--data", text, "--backend", backend]
    result = mlxmoe("train", *arguments, *OPTIONS, "-o", "lora.rank=4", "--out", run)
    assert result.code == 0, result.err
    assert "in adapters of rank 4 and routers" in result.out
    assert losses(run)[2][1] < losses(run)[2][0]
    raw = {step: load_file(checkpoint_folder(run, 2, step) / checkpoint.MODEL) for step in (0, STEPS[2])}
    for name, array in raw[0].items():
        assert np.array_equal(raw[STEPS[2]][name], array) == ("lora_" not in name and "router" not in name), name
    trained = checkpoint.load(checkpoint_folder(run, 2, STEPS[2]))
    assert trained.config.lora is None
    change = trained.weights["layers.0.mlp.experts.up_proj.weight"] - raw[0]["layers.0.mlp.experts.up_proj.weight"]
    assert (np.linalg.matrix_rank(change, tol=1e-4 * np.abs(change).max()) <= 4).all()
    state = trained.optimizer_state
    assert {name.rpartition(".")[2] for name in state} == {"step", "lora_a", "lora_b", "weight"}
    assert {name for name in state if name.endswith(".weight")} == {
        f"{moment}.layers.{layer}.mlp.router.weight" for moment in "mv" for layer in range(2)
    }
    assert mlxmoe("generate", run, "--prompt", "w1 w2", "-n", 4, "--backend", backend).code == 0
    assert mlxmoe("export", run, tmp_path / "out").code == 0  # transformers and mlx-lm give the merged model's logits
    assert mlxmoe("parity", checkpoint_folder(run, 2, STEPS[2])).code == 0
    assert mlxmoe("experts", run).code == 0


class StopsAtTheBoundary(Console):
    def boundary(self, title, certificate):
        raise RuntimeError


@pytest.mark.parametrize(("backend", "rank"), [("torch", 0), ("mlx", 0), ("torch", 2), ("mlx", 2)])
def test_interruptions_change_nothing_and_the_source_may_go(backend, rank, published, text, tmp_path, monkeypatch):
    monkeypatch.setenv("MLXMOE_CACHE", str(tmp_path / "cache"))
    source = shutil.copytree(published / "llama-tied", tmp_path / "source")
    overrides = [*SHORT, f"data.source={text}", "model.context_length=16", "model.dropout=0.1", f"lora.rank={rank}"]
    run = start_from(open_model(source), [2, 3], "demo", None, overrides)
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    start(run, whole, backend)
    with pytest.raises(RuntimeError):
        start(run, pieces, backend, StopsAtTheBoundary(quiet=True))
    assert checkpoint.latest(pieces) is None  # the source is still needed, and found
    for moment in ((2, 1), (2, 7), (3, 3)):
        interrupt = AfterStep(moment, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(TrainingStopped):
            start(open_run(pieces), pieces, backend, interrupt)
        shutil.rmtree(source, ignore_errors=True)
    start(open_run(pieces), pieces, backend)
    assert_same_run(pieces, whole)


def test_a_dense_model_is_trained_on_as_it_is(published, text, mlxmoe, tmp_path):
    """Ours: from where it stood, with fresh moments; also by the name of its best checkpoint."""
    first, second = tmp_path / "first", tmp_path / "second"
    arguments = ["--data", text, "--backend", "torch", *OPTIONS]
    six = ["-o", "phases.dense.steps=6"]
    result = mlxmoe("train", "--from", published / "gpt2", "--phases", 1, *arguments, *six, "--out", first)
    assert result.code == 0, result.err
    stood = checkpoint.load(first / "best")
    result = mlxmoe("train", "--from", first / "best", "--phases", "1,2", *arguments, "--out", second)
    assert result.code == 0, result.err
    assert losses(second)[1][0] == pytest.approx(stood.state.validation_loss, abs=1e-6)
    assert checkpoint.load(checkpoint_folder(second, 1, STEPS[1])).optimizer_state["step"] == STEPS[1]
    assert checkpoint.load(second).state.lineage == (
        "gpt2",
        f"trained for {stood.state.step} steps",
        f"trained for {STEPS[1]} steps",
        "upcycled to 2L-4H-32D-Learned-LN-GELUtanh-PreNorm-4E2",
    )
    grown = mlxmoe("train", "--resume", second, "--phases", "2,3", "--backend", "torch")
    assert "the run begins with phase 1; take --phases 3" in grown.err
    assert mlxmoe("train", "--resume", second, "--backend", "torch").code == 0  # phases 1 and 2 are done
    assert list(losses(second)) == [1, 2]


@pytest.mark.parametrize(("phases", "trained"), [("2", [2]), ("3", [3]), ("2,3", [2, 3])])
def test_a_mixture_is_trained_on_or_grown_at_once(phases, trained, published, text, mlxmoe, tmp_path):
    run, model = tmp_path / "run", published / "mixtral"
    coefficient = ["-o", "model.moe.load_balance_coefficient=0.1"]
    arguments = ["--data", text, "--backend", "torch", *OPTIONS, *coefficient]
    result = mlxmoe("train", "--from", model, "--phases", phases, *arguments, "--out", run)
    assert result.code == 0, result.err
    assert list(losses(run)) == trained
    assert checkpoint.load(run).config.moe.load_balance_coefficient == 0.1
    assert checkpoint.load(run).config.d_model == (32 if trained == [2] else 48)
    assert (run / "boundaries" / "2-3.json").is_file() == (3 in trained)


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_large_logits_are_judged_by_what_rounding_does(backend, published, text, tmp_path, monkeypatch):
    monkeypatch.setenv("MLXMOE_CACHE", str(tmp_path / "cache"))
    source = shutil.copytree(published / "llama-tied", tmp_path / "source")
    edit_config(source, tie_word_embeddings=False)
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * np.float32(1e4)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    overrides = [*SHORT, f"data.source={text}", "phases.moe.steps=1", "phases.large_moe.steps=1"]
    run = start_from(open_model(source), [2, 3], "demo", None, overrides)
    start(run, tmp_path / "run", backend)
    certificate = json.loads((tmp_path / "run" / "boundaries" / "2-3.json").read_text())
    assert 1e-4 < certificate["max_logit_difference"] < certificate["limit_logit_difference"] < 1
    assert certificate["rounding_floor"] > 0


REFUSED = {
    "no model to start from": (None, ["--phases", "2,3"], "begins with phase 1; take --phases 3, or name a model"),
    "not in a row": (None, ["--phases", "1,3"], "--phases 1,3: must be"),
    "backwards": (None, ["--phases", "3,2"], "--phases 3,2: must be"),
    "what to do": (
        "llama-tied",
        [],
        "name the phases to run, such as --phases 2 or --phases 2,3, out of 1 dense, 2 moe",
    ),
    "dense, grown": (
        "llama-tied",
        ["--phases", "3"],
        "is for experts, and .* has no experts; take --phases 1, or --phases 2",
    ),
    "experts, as dense": (
        "mixtral",
        ["--phases", "1,2"],
        "is for a dense model, and .* has 4 experts; take --phases 2, or --phases 3",
    ),
    "another width": ("llama-tied", ["--phases", "2", "-o", "model.d_model=64"], "model.d_model 64: .* has 32; leave"),
    "other experts": ("mixtral", ["--phases", "2", "-o", "model.moe.top_k=1"], "model.moe.top_k 1: .* has 2; leave"),
    "an architecture": ("llama-tied", ["--phases", "2", "--preset", "gpt2"], "model.architecture gpt2: .* has llama"),
    "another tokenizer": ("llama-tied", ["--phases", "2", "--tokenizer", "char"], "tokenizer char: .* leave it out"),
    "longer": ("llama-tied", ["--phases", "2", "-o", "model.context_length=64"], "has 32; leave it out, or take less"),
    "fewer positions": ("gpt2", ["--phases", "2", "-o", "model.context_length=16"], "each position was learned"),
    "adapters of nothing": (None, ["-o", "lora.rank=4"], "lora.rank 4: adapters need a model to adapt"),
    "adapters in the model": ("llama-tied", ["--phases", "2", "-o", "model.lora.rank=4"], "model.lora: set lora.rank"),
    "no such target": ("mixtral", ["--phases", "2", "-o", "lora.targets=[router]"], "lora.targets.0 = 'router'"),
    "resumed": ("llama-tied", ["--phases", "2", "--resume", "run"], "--resume takes the run as it is"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_contradicts_the_model_is_named(case, published, text, mlxmoe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, arguments, said = REFUSED[case]
    source = ["--from", published / model] if model else []
    result = mlxmoe("train", *source, *arguments, "--data", text, "--backend", "torch")
    assert result.code == 2
    assert "\n" not in result.err.strip()
    assert re.search(said, result.err), result.err
    assert not list(tmp_path.iterdir())


def test_a_model_without_a_tokenizer_is_refused(text, mlxmoe, tmp_path):
    save("llama-tied", tmp_path / "theirs")
    result = mlxmoe("train", "--from", tmp_path / "theirs", "--phases", "2", "--data", text, "--out", tmp_path / "run")
    assert "has no tokenizer" in result.err
    assert not (tmp_path / "run").exists()


def test_a_source_that_changed_before_the_first_checkpoint_is_refused(published, text, tmp_path, monkeypatch):
    monkeypatch.setenv("MLXMOE_CACHE", str(tmp_path / "cache"))
    source = shutil.copytree(published / "llama-tied", tmp_path / "source")
    run = start_from(open_model(source), [2], "demo", None, [*SHORT, f"data.source={text}"])
    shutil.rmtree(source)
    shutil.copytree(published / "mixtral", source)
    with pytest.raises(InputError, match=r"model\.architecture llama: .* has mixtral"):
        start(run, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_boundary_stands_in_the_history_once(published, text, mlxmoe, tmp_path, monkeypatch):
    """Also where the run was killed after it was written down and before the first checkpoint."""
    run = tmp_path / "run"
    arguments = ["--from", published / "llama-tied", "--phases", 2, "--data", text, "--backend", "torch", *OPTIONS]
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", lambda *arguments, **options: sys.exit(137))
        assert mlxmoe("train", *arguments, "--out", run).code == 137
    assert [row["event"] for row in jsonl.read(run / "history.jsonl")] == ["boundary"]
    assert mlxmoe("train", "--resume", run).code == 0
    assert [row["event"] for row in jsonl.read(run / "history.jsonl")] == ["boundary", "phase"]


def test_a_run_is_named_after_the_model_that_it_starts_from(published, text, mlxmoe, tmp_path):
    first = tmp_path / "first"
    options = [*OPTIONS, "--data", text, "--tokenizer", "char", "-o", "model.d_model=32", "-o", "model.n_layers=1"]
    result = mlxmoe("train", "--preset", "nano", *options, "--phases", 1, "--backend", "torch", "--out", first)
    assert result.code == 0, result.err
    second = mlxmoe("train", "--from", first, "--phases", 2, "--data", text, *OPTIONS, "--out", tmp_path / "second")
    assert second.code == 0, second.err
    name = checkpoint.load(first).config.display_name
    assert checkpoint.load(tmp_path / "second").state.lineage[:2] == (name, "trained for 12 steps")
    assert f"run        {name}, seed 0" in second.out
