import csv
import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import tokenizers
from support.small_experiments import train

from mlx_moe.analysis.evaluation import _stretches as stretches
from mlx_moe.analysis.evaluation import pinned
from mlx_moe.config import DataConfig
from mlx_moe.storage import checkpoint
from mlx_moe.training.phase_summary import PROMPTS


@pytest.fixture(scope="module")
def run(mlxmoe, tmp_path_factory):
    llama = ("-o", "model.architecture=llama")
    return train(mlxmoe, tmp_path_factory.mktemp("run") / "run", *llama, phases=2)


@pytest.fixture(scope="module")
def table(run, mlxmoe):
    result = mlxmoe("eval", run, "--backend", "torch", "-n", 5, "--max-bytes", 5000)
    assert result.code == 0, result.err
    return list(csv.DictReader((run / "evaluation_results.csv").read_text().splitlines()))


def test_every_checkpoint_has_a_row(run, table):
    assert [(row["phase"], row["step"]) for row in table] == [
        *(("1", "5"), ("1", "10")),
        *(("2", "0"), ("2", "5"), ("2", "10")),
    ]
    assert {row["text_bytes"] for row in table} == {"5000"}
    assert len({row["text_sha256"] for row in table}) == 1
    for row in table:
        loss, tokens = float(row["loss"]), int(row["tokens"])
        assert float(row["perplexity"]) == pytest.approx(math.exp(loss))
        assert float(row["bits_per_byte"]) == pytest.approx(loss * tokens / 5000 / math.log(2))
    losses = [float(row["loss"]) for row in table]
    assert losses[0] > losses[1] == pytest.approx(losses[2], abs=1e-5)  # a birth changes nothing
    assert losses[2] > losses[-1]


def test_the_loss_is_that_of_training_on_other_text(run, table):
    validation = [
        json.loads(line)["validation_loss"]
        for line in (run / "metrics.jsonl").read_text().splitlines()
        if "validation_loss" in line
    ]
    assert float(table[-1]["loss"]) == pytest.approx(validation[-1], abs=0.1)


def test_generations_at_both_temperatures(run, table):
    text = (run / "generations.md").read_text()
    assert text.count("### Greedy") == text.count("### Temperature 0.8") == len(table)
    assert "**Once upon a time" in text


def test_both_backends_agree(run, table, mlxmoe):
    result = mlxmoe("eval", run / "best", "--backend", "mlx", "--json", "-n", 0, "--max-bytes", 5000)
    (row,) = json.loads(result.out)
    best = min(table, key=lambda row: float(row["loss"]))
    assert row["loss"] == pytest.approx(float(best["loss"]), abs=1e-5)
    assert row["text_sha256"] == best["text_sha256"]


def test_a_hugging_face_folder_on_the_same_text(run, table, mlxmoe, tmp_path):
    out = tmp_path / "hf"
    exported = mlxmoe("export", run / "phases" / "1-dense", out, "--format", "llama", "--no-verify")
    assert exported.code == 0, exported.err
    options = ("--backend", "torch", "--json", "-n", 0, "--max-bytes", 3000)
    (ours,), (theirs,) = (
        json.loads(mlxmoe("eval", path, "--data", "stories", *options).out)
        for path in (run / "phases" / "1-dense", out)
    )
    assert theirs["text_sha256"] == ours["text_sha256"]
    assert theirs["loss"] == pytest.approx(ours["loss"], abs=1e-6)


def test_the_subset_does_not_depend_on_the_tokenizer_and_grows_by_whole_documents():
    config = DataConfig(source="stories", n_documents=200)
    small, large = pinned(config, 1000), pinned(config.model_copy(update={"tokenizer": "char"}), 3000)
    assert (small.bytes, large.bytes) == (1000, 3000)
    assert large.documents[: len(small.documents) - 1] == small.documents[:-1]
    assert large.documents[len(small.documents) - 1].startswith(small.documents[-1])
    assert small.sha256 != replace(small, documents=["".join(small.documents)]).sha256


def test_one_long_document_gives_its_last_tokens(tmp_path, monkeypatch):
    monkeypatch.setenv("MLXMOE_CACHE", str(tmp_path / "cache"))
    text = "".join(f"line {n}\n" for n in range(1000))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    config = DataConfig(source=str(tmp_path / "a.txt"), tokenizer="char", validation_fraction=0.1)
    (document,) = pinned(config, 10**6).documents
    assert text.endswith(document)
    assert len(document) == pytest.approx(0.1 * len(text), abs=2)


@pytest.mark.parametrize(("n", "context_length"), [(2, 8), (9, 8), (17, 8), (20, 8), (9000, 16)])
def test_every_token_is_predicted_once(n, context_length):
    ids = np.arange(n, dtype=np.int32)
    windows = list(stretches(ids, context_length))
    np.testing.assert_array_equal(np.concatenate([w[:, 1:].ravel() for w in windows]), ids[1:])
    np.testing.assert_array_equal(np.concatenate([w[:, :-1].ravel() for w in windows]), ids[:-1])
    assert all(w.shape[1] <= context_length + 1 for w in windows)


@pytest.mark.parametrize(
    ("path", "options", "said"),
    [
        ("nowhere", [], "no checkpoint at"),
        ("run", ["--data", "nowhere.txt"], "no file or folder 'nowhere.txt'"),
        ("run", ["--prompt", ""], "--prompt is empty"),
        ("out", [], "is not in a run's folder, so its data is not known; name some with --data"),
    ],
)
def test_what_cannot_be_evaluated(path, options, said, run, mlxmoe, tmp_path):
    if path == "out":
        mlxmoe("upcycle", run / "phases" / "1-dense", tmp_path / "out", "--experts", 2)
    result = mlxmoe("eval", run if path == "run" else tmp_path / path, "--backend", "torch", *options)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert said in result.err


def test_a_project_of_the_users_is_no_run(run, mlxmoe, tmp_path):
    """Though it has a config.yaml and a checkpoint: nothing is written into it."""
    project = tmp_path / "project"
    shutil.copytree(run / "phases/1-dense/checkpoints/step-10", project / "checkpoints/step-10")
    for name in ("evaluation_results.csv", "generations.md", "config.yaml"):
        (project / name).write_text("mine: 3\n")
    result = mlxmoe("eval", project, "--data", "stories", "-n", 1, "--max-bytes", 300, "--backend", "torch")
    assert result.code == 2
    assert "config.yaml is not the whole config of a run" in result.err
    assert (project / "generations.md").read_text() == (project / "evaluation_results.csv").read_text() == "mine: 3\n"


def test_another_tokenizer_of_the_same_size_is_refused(run, mlxmoe, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    file = copy / "tokenizer" / "tokenizer.json"
    values = json.loads(file.read_text())
    vocabulary = values["model"]["vocab"]
    a, b = list(vocabulary)[-2:]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    file.write_text(json.dumps(values))
    commands = {"generate": (), "eval": ("--data", "stories"), "export": (tmp_path / "out", "--no-verify")}
    for command, options in commands.items():
        result = mlxmoe(command, copy, *options)
        assert (result.code, result.err.count("\n")) == (2, 1), result.err
        assert "is not the tokenizer that its run was trained with" in result.err
    assert not (tmp_path / "out").exists()


def test_text_that_the_tokenizer_does_not_know_is_said(mlxmoe, tmp_path):
    run = train(mlxmoe, tmp_path / "run", "--tokenizer", "char", phases=1)
    (tmp_path / "t.txt").write_text("むかしむかし あるところに\n<|endoftext|>\n" * 50)
    options = ("--data", tmp_path / "t.txt", "-n", 0, "--backend", "torch")
    result = mlxmoe("eval", run / "best", *options)
    assert result.code == 0
    assert "% of the tokens stand for text that its tokenizer does not know" in result.err


def test_nothing_is_evaluated_where_one_path_is_wrong(run, mlxmoe, tmp_path):
    (tmp_path / "alone").mkdir()
    for file in checkpoint.latest(run).iterdir():  # in no run's folder: its data is not known
        shutil.copy(file, tmp_path / "alone")
    for name in ("nowhere", "alone"):
        result = mlxmoe("eval", run / "best", tmp_path / name, "--backend", "torch")
        assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)


@pytest.fixture(scope="module")
def cyrillic(mlxmoe, tmp_path_factory):
    """A run whose tokenizer has no token of the prompts that are sampled at a phase's end."""
    folder = tmp_path_factory.mktemp("cyrillic")
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words = ["жилбылпёсикотвдоме" + "абв"[i % 3] for i in range(300)]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=60, special_tokens=["<|endoftext|>"], show_progress=False)
    inner.train_from_iterator(words, trainer)
    (folder / "tokenizer").mkdir()
    inner.save(str(folder / "tokenizer" / "tokenizer.json"))
    text = "\n<|endoftext|>\n".join(" ".join(words[: n + 40]) for n in range(60))
    (folder / "text.txt").write_text(text, encoding="utf-8")
    return train(
        *(mlxmoe, folder / "run", "--data", folder / "text.txt", "--tokenizer", folder / "tokenizer"), phases=1
    )


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_prompts_without_a_token_start_a_text(backend, cyrillic, mlxmoe):
    result = mlxmoe("eval", cyrillic, "--max-bytes", 500, "-n", 3, "--backend", backend)
    assert result.code == 0, result.err
    assert f"**{PROMPTS[0]}**" in (cyrillic / "generations.md").read_text()


@pytest.mark.parametrize("text", ["x", "precious\n"])
def test_a_text_too_short_to_hold_out_any_of_it(text, run, mlxmoe, tmp_path):
    (tmp_path / "a.txt").write_text(text)
    result = mlxmoe("eval", run, "--data", tmp_path / "a.txt", "-n", 0, "--backend", "torch")
    assert (result.code, result.err.count("\n")) == (2, 1), result.err
    assert "a.txt' is too short to evaluate on: nothing of it is held out" in result.err


@pytest.mark.parametrize(
    "command", [("eval", "-n", "0", "--max-bytes", "500"), ("experts", "--sequences", "4"), ("parity",)]
)
def test_what_a_run_that_trains_deletes_meanwhile_is_left_out(command, run, mlxmoe, tmp_path, monkeypatch):
    training = shutil.copytree(run, tmp_path / "run")
    looked_up = list(checkpoint.complete_in(training))
    for pruned in ("phases/1-dense/checkpoints/step-5", "phases/2-moe/checkpoints/step-5"):
        shutil.rmtree(training / pruned)
    monkeypatch.setattr(
        checkpoint, "complete_in", lambda path: (folder for folder in looked_up if path in folder.parents)
    )
    name, *options = command
    backend = () if name == "parity" else ("--backend", "torch")
    result = mlxmoe(name, training, *options, *backend)
    assert result.code == 0, result.err
    if name != "parity":  # which reads the birth and the latest of a phase only
        assert "step-5 is gone: its run deleted it; take a later one; it was left out" in result.err
