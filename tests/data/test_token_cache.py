"""The token cache under damage, kills, full disks and several processes at once."""

import copy
import errno
import hashlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mlx_moe.config import DataConfig
from mlx_moe.data import token_file, tokens
from mlx_moe.data.tokens import batch, fixed_windows, prepare
from mlx_moe.errors import InputError
from mlx_moe.storage import locks

STORIES = DataConfig(source="stories", n_documents=60, tokenizer="char")
DRAW = {"seed": 0, "phase": 1, "step": 0, "batch_size": 4, "context_length": 16}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A cache with one entry, to be copied."""
    cache = tmp_path_factory.mktemp("made")
    prepare(STORIES, cache)
    return cache


@pytest.fixture
def cache(made, tmp_path):
    return shutil.copytree(made, tmp_path / "cache")


@pytest.fixture
def entry(cache):
    (entry,) = cache.iterdir()
    return entry


def rewrite(file, change):
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def flip(file, position=100):
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


def write_id(file, token):
    content = np.fromfile(file, np.uint16)
    content[50] = token
    content.tofile(file)


def ids_beyond(entry):
    """Ids that no model of this vocabulary has, with a hash that fits them."""
    write_id(entry / "train.bin", 60_000)
    sha256 = hashlib.sha256((entry / "train.bin").read_bytes()).hexdigest()
    rewrite(entry / "meta.json", lambda meta: meta["train"].update(sha256=sha256))


def replace_by_fifo(file):
    file.unlink()
    os.mkfifo(file)


def replace_by_folder(file):
    file.unlink()
    file.mkdir()


DAMAGE = {
    "a flipped bit": lambda entry: flip(entry / "train.bin"),
    "a flipped bit of validation": lambda entry: flip(entry / "validation.bin"),
    "ids beyond the vocabulary": ids_beyond,
    "cut": lambda entry: os.truncate(entry / "train.bin", 100),
    "half an id": lambda entry: os.truncate(entry / "train.bin", (entry / "train.bin").stat().st_size - 1),
    "empty": lambda entry: os.truncate(entry / "train.bin", 0),
    "gone": lambda entry: (entry / "train.bin").unlink(),
    "a FIFO": lambda entry: replace_by_fifo(entry / "train.bin"),
    "a folder": lambda entry: replace_by_folder(entry / "train.bin"),
    "a link to zeros": lambda entry: [(entry / "train.bin").unlink(), (entry / "train.bin").symlink_to("/dev/zero")],
    "meta gone": lambda entry: (entry / "meta.json").unlink(),
    "meta empty": lambda entry: (entry / "meta.json").write_text(""),
    "meta a list": lambda entry: (entry / "meta.json").write_text("[]"),
    "meta nested deep": lambda entry: (entry / "meta.json").write_text("[" * 10_000 + "]" * 10_000),
    "meta of many digits": lambda entry: (entry / "meta.json").write_text('{"train": ' + "9" * 5000 + "}"),
    "meta not UTF-8": lambda entry: (entry / "meta.json").write_bytes(b"\xff\xfe{}"),
    "meta a FIFO": lambda entry: replace_by_fifo(entry / "meta.json"),
    "meta huge": lambda entry: os.truncate(entry / "meta.json", 1 << 40),
    "meta of other data": lambda entry: rewrite(
        entry / "meta.json", lambda m: m["source"].update(identity="stories:2")
    ),
    "another dtype": lambda entry: rewrite(entry / "meta.json", lambda meta: meta.update(dtype="uint32")),
    "tokenizer torn": lambda entry: os.truncate(entry / "tokenizer" / "tokenizer.json", 500),
    "tokenizer gone": lambda entry: shutil.rmtree(entry / "tokenizer"),
    "nothing in it": lambda entry: [shutil.rmtree(entry), entry.mkdir()],
    "a file in its place": lambda entry: [shutil.rmtree(entry), entry.write_text("mine")],
    "a dangling link in its place": lambda entry: [shutil.rmtree(entry), entry.symlink_to("gone")],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_made_anew(made, cache, entry, damage):
    whole = prepare(STORIES, made)
    DAMAGE[damage](entry)
    lines = []
    again = prepare(STORIES, cache, lines.append)
    assert again.provenance == whole.provenance
    assert np.array_equal(again.train, whole.train)
    assert any(line.startswith("reading") for line in lines)
    assert all("\n" not in line for line in lines)
    prepare(STORIES, cache, pytest.fail)
    assert not [path for path in cache.iterdir() if path.name.startswith(".")]


def leaves(values, path=()):
    for key, value in values.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))


@pytest.mark.parametrize("wrong", [None, "x", -1, 1e300, [], {}, True, "drop"], ids=str)
def test_every_value_of_meta_may_be_of_any_type(made, tmp_path, wrong):
    (entry,) = made.iterdir()
    meta = json.loads((entry / "meta.json").read_text())
    other = tmp_path / entry.name
    shutil.copytree(entry, other)
    source = tokens._Wanted(STORIES, tokens.open_source(STORIES), None)
    for *above, last in leaves(meta):
        changed = copy.deepcopy(meta)
        holder = changed
        for key in above:
            holder = holder[key]
        holder[last] = wrong
        if wrong == "drop":
            del holder[last]
        (other / "meta.json").write_text(json.dumps(changed))
        try:
            data = tokens._open(other, source)
        except InputError:
            continue
        assert data.provenance["train"]["sha256"] == meta["train"]["sha256"]
        assert data.train.dtype == np.uint16


def test_what_others_put_into_a_damaged_entry_is_kept(cache, entry):
    (entry / "notes.txt").write_text("mine")
    flip(entry / "train.bin")
    prepare(STORIES, cache)
    assert (cache / f"{entry.name}.damaged" / "notes.txt").read_text() == "mine"


def test_a_file_is_hashed_once_and_again_when_it_may_have_changed(cache, entry, monkeypatch):
    prepare(STORIES, cache)
    hashed = []
    inspect = token_file.inspect
    monkeypatch.setattr(token_file, "inspect", lambda *arguments: hashed.append(1) or inspect(*arguments))
    prepare(STORIES, cache)
    assert not hashed
    os.utime(entry / "train.bin")
    prepare(STORIES, cache)
    assert len(hashed) == 1
    prepare(STORIES, cache)
    assert len(hashed) == 1
    (entry / "verified.json").write_text('{"train": [1], "validation": {"sha256": 3}}')
    prepare(STORIES, cache)
    assert len(hashed) == 3
    (entry / "verified.json").write_text("[" * 5000)
    prepare(STORIES, cache)
    assert len(hashed) == 5


def test_a_note_of_another_hash_is_not_believed(cache, entry):
    status = (entry / "train.bin").stat()
    flip(entry / "train.bin")
    os.utime(entry / "train.bin", ns=(status.st_atime_ns, status.st_mtime_ns))  # as a bit that flips on the disk
    lines = []
    prepare(STORIES, cache, lines.append)
    assert "damaged" in lines[0]


def test_a_cache_that_cannot_be_written_is_read(cache, entry, monkeypatch):
    (entry / "verified.json").unlink()

    def refused(*arguments):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tokens, "_note_verified", refused)
    prepare(STORIES, cache, pytest.fail)


CHANGES = {
    "cut": lambda file: os.truncate(file, 10),
    "emptied": lambda file: os.truncate(file, 0),
    "longer": lambda file: os.truncate(file, file.stat().st_size + 2),
    "a bit": flip,
    "an id beyond the vocabulary": lambda file: write_id(file, 65_535),
    "all zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("draw", ["batch", "fixed_windows", "all"])
def test_a_file_that_changes_while_it_is_used_ends_in_one_line(cache, entry, change, draw):
    data = prepare(STORIES, cache)
    draws = {
        "batch": lambda: batch(data.train, **DRAW),
        "fixed_windows": lambda: fixed_windows(data.train, 8, 16),
        "all": lambda: data.train[:],
    }
    draws[draw]()
    CHANGES[change](entry / "train.bin")
    with pytest.raises(InputError, match=r"train\.bin .*(tokens that were written|the vocabulary has)") as caught:
        draws[draw]()
    assert "\n" not in str(caught.value)


def test_ids_are_checked_even_where_the_file_looks_unchanged(cache, entry, monkeypatch):
    data = prepare(STORIES, cache)
    monkeypatch.setattr(token_file, "fingerprint", lambda status: data.train.contents.fingerprint)
    np.full(len(data.train), 40_000, np.uint16).tofile(entry / "train.bin")
    with pytest.raises(InputError, match=r"train\.bin"):
        batch(data.train, **DRAW)


def test_what_does_not_change_the_tokens_does_not_matter(cache, entry):
    data = prepare(STORIES, cache)
    before = batch(data.train, **DRAW)
    os.utime(entry / "train.bin")
    assert np.array_equal(batch(data.train, **DRAW), before)
    (entry / "train.bin").chmod(0o600)
    os.link(entry / "train.bin", cache / "backup")
    assert np.array_equal(batch(data.train, **DRAW), before)
    shutil.rmtree(entry)
    assert np.array_equal(batch(data.train, **DRAW), before)


def test_a_token_file_is_indexed_as_an_array(cache):
    data = prepare(STORIES, cache)
    array = np.asarray(data.train)
    assert len(data.train) == len(array)
    for index in (slice(None), slice(3, 9), slice(9, 3), slice(-5, None), slice(None, None, 7), 3, -1, [1, 5, 5]):
        assert np.array_equal(data.train[index], array[index])
    assert np.asarray(data.train, np.int64).dtype == np.int64
    assert np.array_equal(fixed_windows(data.train, 5, 16), fixed_windows(array, 5, 16))
    assert np.array_equal(batch(data.train, **DRAW), batch(array, **DRAW))


def test_the_source_is_the_one_that_is_named_now(tmp_path):
    for name in ("theirs", "mine"):
        (tmp_path / f"{name}.txt").write_text("the same text\n" * 50)
        (tmp_path / f"tokenizer-{name}").mkdir()
    paths = [tmp_path / f"{name}.txt" for name in ("theirs", "mine")]
    first, second = (prepare(DataConfig(source=str(path), tokenizer="char"), tmp_path / "cache") for path in paths)
    assert "theirs.txt" in first.provenance["source"]["description"]
    assert "mine.txt" in second.provenance["source"]["description"]
    assert first.provenance["source"]["identity"] == second.provenance["source"]["identity"]
    first.tokenizer.save(tmp_path / "tokenizer-theirs")
    first.tokenizer.save(tmp_path / "tokenizer-mine")
    for name in ("theirs", "mine"):
        spec = str(tmp_path / f"tokenizer-{name}")
        data = prepare(DataConfig(source=str(paths[0]), tokenizer=spec), tmp_path / "cache")
        assert data.provenance["tokenizer"]["spec"] == spec
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize("place", ["~nobody-at-all/x", "file/below", "a\0b", "x" * 300, "link", "/dev/null", "/proc/x"])
def test_a_cache_that_cannot_be_is_one_line(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "link").symlink_to("nowhere/at/all")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(os, "environ", os.environ | {"MLXMOE_CACHE": place})
    with pytest.raises(InputError, match=r"token cache.*; set MLXMOE_CACHE to a folder you can write") as caught:
        prepare(STORIES)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_relative_cache_is_beside_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLXMOE_CACHE", "here/it is")
    data = prepare(STORIES)
    monkeypatch.chdir("/")
    assert len(data.train[:]) == len(data.train)
    assert len(list((tmp_path / "here" / "it is").iterdir())) == 1


def test_no_home(monkeypatch):
    monkeypatch.delenv("MLXMOE_CACHE", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    with pytest.raises(InputError, match=r"home directory.*set MLXMOE_CACHE"):
        prepare(STORIES)


def test_text_that_comes_to_no_tokens(tmp_path):
    prepare(STORIES, tmp_path / "cache").tokenizer.save(tmp_path / "tokenizer")
    empties = {"type": "Replace", "pattern": {"Regex": "[\\s\\S]+"}, "content": ""}
    rewrite(tmp_path / "tokenizer" / "tokenizer.json", lambda values: values.update(normalizer=empties))
    (tmp_path / "a.txt").write_text("one")
    with pytest.raises(InputError, match="makes no tokens of this text"):
        prepare(DataConfig(source=str(tmp_path / "a.txt"), tokenizer=str(tmp_path / "tokenizer")), tmp_path / "cache")


# Other processes

SLOW = "import time\nfrom mlx_moe.data import tokens\nfrom mlx_moe.config import DataConfig\nfrom pathlib import Path\n"


def build_elsewhere(cache, before_publishing):
    """Another process that makes the entry of STORIES and runs some code when it is nearly done."""
    code = SLOW + (
        "def pause(folder, contents, note=tokens._note_verified):\n"
        "    note(folder, contents)\n"
        f"    {before_publishing}\n"
        "tokens._note_verified = pause\n"
        f"config = DataConfig(source='stories', n_documents={STORIES.n_documents}, tokenizer='char')\n"
        f"tokens.prepare(config, Path({str(cache)!r}), lambda line: print(line, flush=True))\n"
        "print('finished', flush=True)\n"
    )
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def nearly_done(cache):
    return lambda: any(cache.glob(".mlxmoe-partial-*/folder/verified.json"))


def test_a_killed_build_leaves_nothing_behind_the_next_start(tmp_path):
    process = build_elsewhere(tmp_path, "time.sleep(60)")
    wait_for(nearly_done(tmp_path))
    process.kill()
    process.communicate()
    assert list(tmp_path.glob(".mlxmoe-partial-*"))
    other = prepare(STORIES.model_copy(update={"n_documents": 61}), tmp_path)
    assert not list(tmp_path.glob(".mlxmoe-partial-*"))
    assert len(other.train)


def test_another_process_that_makes_the_same_tokens_is_waited_for(tmp_path, made):
    process = build_elsewhere(tmp_path, "time.sleep(0.7)")
    wait_for(nearly_done(tmp_path))
    lines = []
    data = prepare(STORIES, tmp_path, lines.append)
    assert lines == ["another process is making these tokens; waiting for it"]
    assert data.provenance == prepare(STORIES, made).provenance
    assert process.communicate()[0].endswith("finished\n")
    assert len(list(tmp_path.iterdir())) == 1


def test_the_work_of_a_process_that_dies_is_taken_over(tmp_path):
    process = build_elsewhere(tmp_path, "import os, signal; time.sleep(0.7); os.kill(os.getpid(), signal.SIGKILL)")
    wait_for(nearly_done(tmp_path))
    lines = []
    prepare(STORIES, tmp_path, lines.append)
    assert [line.partition(" ")[0] for line in lines] == ["another", "reading"]
    assert process.wait() == -signal.SIGKILL
    process.communicate()
    prepare(STORIES, tmp_path, pytest.fail)


def _race(cache, barrier, queue, is_locked):
    if not is_locked:  # as on a file system that knows no flock

        def unsupported(*arguments):
            raise OSError(errno.ENOTSUP, "Operation not supported")

        locks.fcntl.flock = unsupported
    lines = []
    barrier.wait(timeout=60)
    queue.put((prepare(STORIES, Path(cache), lines.append).provenance, lines))


@pytest.mark.parametrize(("is_locked", "is_damaged"), [(True, True), (True, False), (False, False)])
def test_processes_at_once_all_succeed(tmp_path, made, is_locked, is_damaged):
    cache = tmp_path / "cache"
    if is_damaged:
        shutil.copytree(made, cache)
        (entry,) = cache.iterdir()
        flip(entry / "train.bin")
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(3), context.Queue()
    racers = [context.Process(target=_race, args=(str(cache), barrier, queue, is_locked)) for _ in range(3)]
    for racer in racers:
        racer.start()
    results = [queue.get(timeout=60) for _ in racers]
    for racer in racers:
        racer.join()
        assert racer.exitcode == 0
    expected = prepare(STORIES, made).provenance
    assert all(provenance == expected for provenance, _ in results)
    builds = [line for _, lines in results for line in lines if line.startswith("reading")]
    assert len(builds) == 1 or not is_locked
    prepare(STORIES, cache, pytest.fail)
    assert [path for path in cache.iterdir() if ".damaged" not in path.name] == [cache / entries_name(made)]


def test_where_nothing_can_be_locked_the_work_of_others_is_left_alone(tmp_path, monkeypatch):
    process = build_elsewhere(tmp_path, "time.sleep(0.7)")
    wait_for(nearly_done(tmp_path))

    def unsupported(*arguments):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(locks.fcntl, "flock", unsupported)
    prepare(STORIES.model_copy(update={"n_documents": 61}), tmp_path)
    assert process.communicate()[0].endswith("finished\n")


def entries_name(cache):
    (entry,) = cache.iterdir()
    return entry.name


@pytest.mark.parametrize("tokenizer", ["char", "bpe:300"])
@pytest.mark.parametrize("limit", [0, 1000, 20_000])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, tokenizer, limit):
    def fill():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    code = (
        "from cli import main\nimport sys\n"
        f"sys.argv = ['mlxmoe', 'data', 'describe', '--data', 'stories', '-o', 'data.n_documents=60', "
        f"'--tokenizer', '{tokenizer}']\nmain()\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"MLXMOE_CACHE": str(tmp_path / "cache"), "PYTHONPATH": os.getcwd()},
        preexec_fn=fill,
    )
    assert result.returncode == 2, result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert "token cache" in result.stderr
    assert "MLXMOE_CACHE" in result.stderr
    assert list(tmp_path.rglob("*")) in ([], [tmp_path / "cache"])
