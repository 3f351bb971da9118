"""Disks that take no more, folders that cannot be written, data that changed: one line, and nothing is lost."""

import contextlib
import resource
import tempfile
from pathlib import Path

import pytest
from support.short_runs import AfterStep, assert_same_run, checkpoint_folder, short_run, start

from mlx_moe.data.tokens import prepare
from mlx_moe.errors import InputError
from mlx_moe.storage import checkpoint, jsonl
from mlx_moe.storage.identity import RunIdentity
from mlx_moe.storage.run_folder import RunFolder
from mlx_moe.training.run import open_run


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def own_cache(cache, monkeypatch):
    monkeypatch.setenv("MLXMOE_CACHE", str(cache))


@pytest.fixture(scope="module")
def whole(cache, tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLXMOE_CACHE", str(cache))
        start(short_run(), directory, n_phases=2)
    return directory


IDENTITY = RunIdentity(
    backend="torch",
    device="cpu",
    device_label="CPU",
    precision="fp32",
    threads=1,
    processes=1,
    machine="arm64",
    versions={},
    last_phase=3,
)


@contextlib.contextmanager
def full_disk():
    """Yields a function after which no file grows beyond so many bytes: the system refuses, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda n_bytes: resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, limits[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def go_on(directory):
    start(open_run(directory), directory, n_phases=2)


def refusal(function, *arguments, **options):
    with pytest.raises(InputError) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("phase", [1, 2])
@pytest.mark.parametrize("bytes_left", [0, 30])
def test_a_disk_that_fills_while_rows_are_written(phase, bytes_left, whole, tmp_path):
    metrics = tmp_path / "run" / "metrics.jsonl"
    with full_disk() as limit:
        console = AfterStep((phase, 7), lambda: limit(metrics.stat().st_size + bytes_left))
        message = refusal(start, short_run(), tmp_path / "run", console=console)
    last = checkpoint.latest(tmp_path / "run")
    assert last.name == "step-6"
    for text in (
        "File too large",
        str(last.relative_to(tmp_path / "run")),
        f"mlxmoe train --resume {tmp_path / 'run'}",
    ):
        assert text in message
    assert metrics.read_bytes().endswith(b"\n") == (bytes_left == 0)  # half a row
    go_on(tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)


def test_a_disk_that_fills_while_a_checkpoint_is_saved(whole, tmp_path):
    with full_disk() as limit:
        message = refusal(start, short_run(), tmp_path / "run", console=AfterStep((2, 5), lambda: limit(64 * 1024)))
    for text in ("step-5: ", "nothing of it was kept", "the last checkpoint is phases/2-moe/checkpoints/step-3"):
        assert text in message
    names = {path.name for path in checkpoint_folder(tmp_path / "run", 2, 0).parent.iterdir()}
    assert names == {"step-0", "step-3"}
    go_on(tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize("n_bytes", [0, 100, 1200, 3000])
def test_a_disk_that_is_full_from_the_start(n_bytes, whole, tmp_path):
    with full_disk() as limit:
        limit(n_bytes)
        message = refusal(start, short_run(), tmp_path / "run")
    if "nothing was begun" in message:
        assert "--out" in message
        assert list((tmp_path / "run").iterdir()) == []
    else:
        assert "there is no checkpoint yet" in message
        assert [path for path in (tmp_path / "run").rglob("*") if path.name.startswith(".")] == []
        start(open_run(tmp_path / "run"), tmp_path / "run", n_phases=1)
        assert checkpoint.load(tmp_path / "run").state == checkpoint.load(whole / "phases" / "1-dense").state


def test_a_folder_that_may_not_be_written(as_nobody):
    run = short_run()
    data = prepare(run.data)
    with tempfile.TemporaryDirectory() as parent:
        Path(parent).chmod(0o555)
        with as_nobody():
            message = refusal(RunFolder(Path(parent) / "run").write_metadata, run, IDENTITY, data, {})
    assert message == f"cannot write {parent}/run: Permission denied; nothing was begun; name another folder with --out"


def test_going_on_with_other_data_is_refused(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Once there was a text of no great length. " * 40)
    run = short_run(f"data.source={text}")
    start(run, tmp_path / "run", n_phases=1)
    rows = jsonl.read(tmp_path / "run" / "metrics.jsonl")
    text.write_text("Once there was another text of some length. " * 40)
    message = refusal(start, open_run(tmp_path / "run"), tmp_path / "run")
    for part in (str(text), "data.json", "another run"):
        assert part in message
    assert jsonl.read(tmp_path / "run" / "metrics.jsonl") == rows


def test_going_on_past_a_damaged_checkpoint(whole, tmp_path):
    start(short_run(), tmp_path / "run", n_phases=1)
    weights = checkpoint.latest(tmp_path / "run") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    go_on(tmp_path / "run")
    assert weights.parent.with_name("step-12.damaged").is_dir()
    assert_same_run(tmp_path / "run", whole)


def test_a_damaged_birth_is_crossed_over_again(whole, tmp_path):
    start(short_run(), tmp_path / "run", n_phases=1)
    birth = checkpoint_folder(tmp_path / "run", 2, 0)
    birth.mkdir(parents=True)  # without a manifest
    folder = RunFolder(tmp_path / "run")
    folder.log_event({"event": "boundary", "phase": 2, "passed": False})  # of the boundary that was lost
    go_on(tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    start(short_run(), tmp_path / "run", n_phases=1)
    other = RunFolder(tmp_path / "run")
    other.acquire_lock()
    assert "another process is training in" in refusal(go_on, tmp_path / "run")
    other.close()
    go_on(tmp_path / "run")


def test_half_a_config_is_refused(tmp_path):
    start(short_run(), tmp_path / "run", n_phases=1)
    config = tmp_path / "run" / "config.yaml"
    text = config.read_text()
    for part in ("", text[: text.index("\nphases:") + 1]):
        config.write_text(part)
        assert "is not the whole config of a run: it has no" in refusal(open_run, tmp_path / "run")


def test_what_the_system_refuses_is_named(tmp_path):
    start(short_run(), tmp_path / "run", n_phases=1)
    (tmp_path / "run" / "environment.json").unlink()
    (tmp_path / "run" / "environment.json").mkdir()
    message = refusal(go_on, tmp_path / "run")
    assert f"cannot write {tmp_path}/run/environment.json: Is a directory;" in message
    (tmp_path / "run" / "environment.json").rmdir()
    history = tmp_path / "run" / "history.jsonl"
    history.unlink()
    history.symlink_to("history.jsonl")
    assert f"cannot read {history}: Too many levels of symbolic links" in refusal(go_on, tmp_path / "run")


def test_a_run_that_began_in_the_place_of_a_new_one_stays(tmp_path):
    run = short_run()
    data = prepare(run.data)
    ours, theirs = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    ours.acquire_lock()  # there is no folder yet
    ours.check_not_begun()
    theirs.write_metadata(run.model_copy(update={"name": "theirs"}), IDENTITY, data, {}, is_new=True)
    theirs.close()
    assert "has become a run in the meantime" in refusal(ours.write_metadata, run, IDENTITY, data, {}, True)
    ours.close()
    assert open_run(tmp_path / "run").name == "theirs"
