"""A run's folder in which one thing is wrong: whoever reads it says so in one line, or does without.

MLXMOE_FUZZ_SECONDS=600 tries that many seconds' worth of mutations instead of a sample.
"""

import contextlib
import io
import json
import os
import random
import re
import shutil
import time
from itertools import zip_longest

import pytest
import yaml
from matplotlib import rc_context
from support.short_runs import short_run, start

from mlx_moe.analysis.comparison import compare, show
from mlx_moe.analysis.experts import analyse
from mlx_moe.analysis.plots import FIGURES, STYLE
from mlx_moe.analysis.report import render
from mlx_moe.analysis.run_reader import read_record
from mlx_moe.errors import InputError
from mlx_moe.training.backend import choose_backend

SECONDS = float(os.environ.get("MLXMOE_FUZZ_SECONDS", 0))
SAMPLE = 250
LOGS = ("metrics.jsonl", "history.jsonl")
FILES = (*LOGS, "data.json", "environment.json", "boundaries/1-2.json", "boundaries/2-3.json", "experts.json")
CONFIG = "config.yaml"
DELETED = object()
EVIL = "</script><script>alert(1)</script>[/b]\x1b[31m\x00\u202e"
# What JSON's writer would not write stands for itself as a text, and is put in afterwards.
WRITTEN_OUT = {"@DEEP@": "[" * 10_000 + "]" * 10_000, "@DIGITS@": "9" * 5_000, "@INFINITE@": "1e999"}
VALUES = (
    *(DELETED, None, True, 0, 7, -1, 0.5, 1e-320, 1e308, -1e308, 2**63, 10**300, float("nan"), float("inf")),
    *("", "text", "3", "x" * 100_000, "\ud800", EVIL, [], {}, [[]], [1.0], [[1.0], [1.0, 2.0]], {"": None}),
    *WRITTEN_OUT,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mutated") / "run"
    start(short_run("training.log_every=4", "training.eval_every=6", "training.keep_checkpoints=1"), folder)
    (folder / "experts.json").write_text(json.dumps(analyse(folder, choose_backend("torch"), "cpu", 2)))
    shutil.rmtree(folder / "phases")
    return folder


def places(value, path=()):
    """The paths of all values in a value, itself first."""
    yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield from places(inner, (*path, key))


def mutated(value, path, new):
    """A copy with one value replaced, or deleted."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    if new is DELETED and len(path) == 1:
        del copy[path[0]]
    else:
        copy[path[0]] = mutated(value[path[0]], path[1:], new)
    return copy


def written(values, name):
    if name == CONFIG:
        text = yaml.safe_dump(values, sort_keys=False)
    elif name in LOGS:
        text = "".join(json.dumps(row) + "\n" for row in values)
    else:
        text = json.dumps(values)
    for mark, instead in WRITTEN_OUT.items():
        text = re.sub(f"[\"']?{mark}[\"']?", instead, text)
    return text.encode("utf-8", "surrogatepass")


def mutations_of_values(run):
    """(name of the file, what was done, its bytes)"""
    for name in (*FILES, CONFIG):
        text = (run / name).read_text()
        if name in LOGS:
            values = [json.loads(line) for line in text.splitlines()]
        else:
            values = yaml.safe_load(text) if name == CONFIG else json.loads(text)
        for path in places(values):
            if not path and name in LOGS:
                continue
            for new in VALUES:
                if path or new is not DELETED:
                    yield name, (path, "deleted" if new is DELETED else repr(new)[:40]), (values, path, new)


def mutations_of_bytes(run, dice):
    for name in (*FILES, CONFIG):
        data = (run / name).read_bytes()
        for _ in range(20):
            at = dice.randrange(len(data))
            yield name, f"cut at {at}", data[:at]
            yield name, f"bit flipped at {at}", data[:at] + bytes([data[at] ^ 1 << dice.randrange(8)]) + data[at + 1 :]
            yield name, f"NUL bytes from {at}", data[:at] + bytes(64) + data[at + 64 :]
            yield name, f"no UTF-8 at {at}", data[:at] + b"\xff\xfe" + data[at + 1 :]
            yield name, f"said twice from {at}", data + data[at:]
        yield name, "empty", b""
        for kind in ("gone", "a folder", "a FIFO", "/dev/zero", "nowhere"):
            yield name, kind, kind


def in_turn(mutations, dice):
    """Shuffled, and of every file as often as of any other, as long as it has some left."""
    by_file = {}
    for mutation in mutations:
        by_file.setdefault(mutation[0], []).append(mutation)
    for of_one in by_file.values():
        dice.shuffle(of_one)
    return [mutation for turn in zip_longest(*by_file.values()) for mutation in turn if mutation is not None]


def look(folder, beside, draws):
    """What every command that reads a run does with it; whether it was read."""
    try:
        record = read_record(folder)
    except InputError as refused:
        message = str(refused)
    else:
        message = ""
    assert "\n" not in message
    if message:
        return False
    page = render(record)
    assert page.count("<script") == 2
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1]
    json.loads(data, parse_constant=no_json)
    with contextlib.suppress(InputError), contextlib.redirect_stdout(io.StringIO()) as out:
        compared = compare([folder, beside])
        json.dumps(compared.to_json(), allow_nan=False)
        show(compared)
    assert "\x1b[31m" not in out.getvalue()
    if draws:
        with rc_context(STYLE):
            for draw in FIGURES.values():
                if (figure := draw(record)) is not None:
                    figure.savefig(io.BytesIO(), format="png", dpi=40)
    return True


def no_json(constant):
    raise ValueError(f"{constant} is no JSON")


def put(folder, name, content):
    file = folder / name
    file.unlink()
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content == "a folder":
        file.mkdir()
    elif content == "a FIFO":
        os.mkfifo(file)
    elif content != "gone":
        file.symlink_to(content)


def put_back(folder, name, run):
    file = folder / name
    if file.is_dir() and not file.is_symlink():
        file.rmdir()
    else:
        file.unlink(missing_ok=True)
    shutil.copyfile(run / name, file)


def test_one_thing_wrong(run, tmp_path, capsys):
    dice = random.Random(1)
    chosen = in_turn([*mutations_of_values(run), *mutations_of_bytes(run, dice)], dice)
    folder, ends = tmp_path / "run", time.monotonic() + SECONDS
    shutil.copytree(run, folder)
    tried, refused, faults = 0, 0, []
    for name, what, content in chosen:
        if (tried >= SAMPLE and not SECONDS) or (SECONDS and time.monotonic() > ends):
            break
        tried += 1
        put(folder, name, written(mutated(*content), name) if isinstance(content, tuple) else content)
        began = time.monotonic()
        try:
            refused += not look(folder, run, draws=bool(SECONDS) or tried % 10 == 0)
        except Exception as error:
            faults.append(f"{name} {what}: {type(error).__name__}: {str(error)[:120]}")
        else:
            if time.monotonic() - began > 10:
                faults.append(f"{name} {what}: took {time.monotonic() - began:.0f} s")
        put_back(folder, name, run)
    with capsys.disabled():
        print(f"\n{tried} of {len(chosen)} mutations: {refused} refused, {len(faults)} faults")
    assert not faults, f"{len(faults)} of {tried}\n" + "\n".join(faults[:40])
