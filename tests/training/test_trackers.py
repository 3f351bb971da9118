"""Trackers get each row once, also over a resumption, and never stop a run."""

import importlib.util
import json
import signal
import sqlite3
import struct

import pytest
from support.short_runs import AfterStep, short_run, start

from mlx_moe.errors import InputError
from mlx_moe.storage import jsonl
from mlx_moe.training import trackers
from mlx_moe.training.console import Console
from mlx_moe.training.run import open_run
from mlx_moe.training.stopping import TrainingStopped


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("MLXMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("WANDB_MODE", "offline")


def interrupted_and_resumed(run, directory):
    """Steps 11 and 12 are done twice: their checkpoint is gone."""
    with pytest.raises(TrainingStopped):
        start(run, directory, console=AfterStep((1, 12), lambda: signal.raise_signal(signal.SIGINT)))
    for name in ("step-12", "step-10", "step-9"):
        checkpoint = directory / "phases" / "1-dense" / "checkpoints" / name
        if checkpoint.exists():
            checkpoint.rename(checkpoint.with_name(f".{name}.removed"))
    start(open_run(directory), directory, n_phases=2)
    return jsonl.read(directory / "metrics.jsonl")


class File:
    """A tracker that writes to a file."""

    def __init__(self, path):
        self.path = path

    def log(self, row, *, step):
        with self.path.open("a") as file:
            file.write(json.dumps(row | {"global_step": step}) + "\n")

    def finish(self):
        with self.path.open("a") as file:
            file.write('{"finished": true}\n')


def register(monkeypatch, open_service):
    monkeypatch.setattr("mlx_moe.training.trackers.find_spec", lambda name: True)
    monkeypatch.setitem(trackers.START, "wandb", lambda identity, directory, config: open_service(identity))


def test_a_tracker_gets_every_row_once(tmp_path, monkeypatch):
    identities = []

    def open_service(identity):
        identities.append(identity)
        return File(tmp_path / "tracked.jsonl")

    register(monkeypatch, open_service)
    rows = interrupted_and_resumed(short_run("training.tracker=wandb"), tmp_path / "run")
    tracked = jsonl.read(tmp_path / "tracked.jsonl")
    assert [row for row in tracked if "finished" in row] == [{"finished": True}] * 2
    assert tracked.pop() == {"finished": True}
    got = [row for row in tracked if "finished" not in row]
    assert [(row["phase"], row["phase_step"]) for row in got] == [(row["phase"], row["step"]) for row in rows]
    assert [row["global_step"] for row in got] == list(range(len(rows)))
    for row, sent in zip(rows, got, strict=True):
        for name in ("loss", "validation_loss"):
            assert sent.get(name) == row.get(name)
        if "expert_load" in row:
            assert sent["expert_load/1/3"] == row["expert_load"][1][3]
    assert len(identities) == 2
    assert len(set(identities)) == 1
    assert identities[0].startswith("run-")


@pytest.mark.parametrize("method", ["open", "log", "finish"])
def test_a_tracker_that_fails_is_warned_of_once(method, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise ConnectionError("no route\nto host")

    class Recording(Console):
        def warn(self, text):
            warnings.append(text)

    warnings = []
    service = File(tmp_path / "tracked.jsonl")
    if method != "open":
        setattr(service, method, fail)
    register(monkeypatch, fail if method == "open" else lambda identity: service)
    start(short_run("training.tracker=wandb"), tmp_path / "run", console=Recording(quiet=True), n_phases=1)
    assert len(warnings) == 1
    assert "wandb failed and gets no more rows (no route to host)" in warnings[0]
    assert len(jsonl.read(tmp_path / "run" / "metrics.jsonl")) == 13


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_a_tracker_that_is_not_installed_is_refused_before_training(name, tmp_path, monkeypatch):
    monkeypatch.setattr("mlx_moe.training.trackers.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'mlxmoe\[trackers\]', or take none"):
        start(short_run(f"training.tracker={name}"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


needs_trackio = pytest.mark.skipif(not importlib.util.find_spec("trackio"), reason="trackio is not installed")
needs_wandb = pytest.mark.skipif(not importlib.util.find_spec("wandb"), reason="wandb is not installed")


@needs_trackio
@pytest.mark.filterwarnings("default")
def test_trackio_gets_the_rows(tmp_path):
    rows = interrupted_and_resumed(short_run("training.tracker=trackio"), tmp_path / "run")
    with sqlite3.connect(tmp_path / "trackio" / "mlxmoe.db") as database:
        sent = database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY step").fetchall()
    assert {name for name, _, _ in sent} == set(json.loads((tmp_path / "run" / "tracker.json").read_text()).values())
    assert [step for _, step, _ in sent] == list(range(len(rows)))
    for row, (_, _, metrics) in zip(rows, sent, strict=True):
        assert json.loads(metrics).get("loss") == row.get("loss")


@needs_wandb
@pytest.mark.filterwarnings("default")
def test_wandb_gets_the_rows(tmp_path):
    rows = interrupted_and_resumed(short_run("training.tracker=wandb"), tmp_path / "run")
    sent = {}
    for file in sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")):
        for items in wandb_rows(file):
            assert items["_step"] not in sent
            sent[items["_step"]] = items
    assert sorted(sent) == list(range(len(rows)))
    for step, row in enumerate(rows):
        assert sent[step].get("loss") == row.get("loss")


@needs_wandb
@pytest.mark.filterwarnings("default")
def test_wandb_without_a_login_does_not_stop_training(tmp_path, monkeypatch, capsys):
    import wandb

    wandb.teardown()  # it reads the environment once
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    start(short_run("training.tracker=wandb"), tmp_path / "run", console=Console(), n_phases=1)
    wandb.teardown()
    assert capsys.readouterr().out.count("wandb failed and gets no more rows") == 1


def wandb_rows(file):
    """The history in a .wandb file: LevelDB's log format, 32 KiB blocks of records with a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, message = file.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<xxxxHB", content, at)
        message += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # all of a message, or its end
            record, message = Record.FromString(message), b""
            if record.HasField("history"):
                yield {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
