"""Wrong files and options, by the thousand, for every reader: each is taken or refused in a line, at once.

    python tests/faults/fuzz.py --seconds 600           new ones, as long as there is time
    python tests/faults/fuzz.py --case run-logs:17       one of them, again, in this process

A case is a reader and a number, from which all that is random is drawn. It is run in a copy of the materials, in a
process that runs many: what hangs or crashes takes only that process with it. Not allowed are: an error that nobody
expected, more than SLOW seconds of computing, HANG seconds in all, MEMORY bytes, a crash, a line that cannot be read or
that steers the terminal, and a change of any file that the command has no business with.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing.connection
import os
import re
import shlex
import shutil
import signal
import stat
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import count, islice, takewhile
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT), str(ROOT / "tests")]

from commands import COMMANDS, DENSE, EXPERTS, ON_CPU, SMALL, TRAIN  # noqa: E402
from materials import build  # noqa: E402
from mutate import EVIL_NAME, TEXTS, YAML_RAWS, mutate_file  # noqa: E402
from racing import CONTEXT  # noqa: E402
from running import Outcome, run_here  # noqa: E402
from trees import lost, snapshot  # noqa: E402

SLOW, HANG = 5.0, 10.0  # seconds: of computing, and in all
MEMORY = 4 << 30  # bytes
MOST_LINES, LONGEST_LINE = 8, 1_500  # of an error; one line a fault of a config
OUTSIDE = Path("/tmp") / EVIL_NAME
CASES_OF_A_PROCESS = 300
CACHE = "cache"  # of tokens, in the materials, for readers that may spoil it

Call = tuple[str, ...]
IMPORT: Call = ("import", "model", "out")
GENERATE: Call = ("generate", "model", "-n", "1", *ON_CPU)
DESCRIBE = ("data", "describe", "--preset", "llama", *SMALL, "--out", "out")
RESUME: Call = ("train", "--resume", "run")
FIRST = f"{DENSE}/checkpoints/step-2"
LAST = f"{EXPERTS}/checkpoints/step-2"
MODELS = ("llama3", "gpt2", "qwen3_moe-dense-layers", "granitemoehybrid")
TOKENIZERS = ("words", "bpe", "unigram", "char")


@dataclass(frozen=True)
class Reader:
    """What reads a file: one of the `files` (patterns) is changed, and one of the `calls` made.

    `needs`: the materials that it takes. `may_change`: what the command may write, besides `out`. `prepare`: done first,
    with the folder and the generator. `share`: how often it comes, relative to others.
    """

    files: Sequence[str]
    calls: Sequence[Call]
    needs: Sequence[str]
    may_change: Sequence[str] = ()
    prepare: Callable[[Path, Random], None] | None = None
    finish: Callable[[Path, Random], None] | None = None
    share: int = 1


def choose_model(folder: Path, random: Random) -> None:
    """Put one of several families in the model's place, and in the tokenizer's one of several kinds."""
    shutil.move(folder / "models" / random.choice(MODELS), folder / "model")
    for file in (folder / "tokenizers" / random.choice(TOKENIZERS)).iterdir():
        shutil.copy(file, folder / "model" / file.name)


def list_anew(folder: Path, random: Random) -> None:
    """Mostly, make the manifests of checkpoints agree with what was changed, which is then read."""
    if random.random() < 0.25:
        return
    for manifest in (folder / "run").glob("phases/*/checkpoints/*/manifest.json"):
        with contextlib.suppress(OSError, ValueError, AttributeError, TypeError, RecursionError):
            listed = json.loads(manifest.read_text())
            for name in listed:
                if (manifest.parent / name).is_file():  # and no device without an end
                    data = (manifest.parent / name).read_bytes()
                    listed[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            manifest.write_text(json.dumps(listed))


RUN_CALLS: tuple[Call, ...] = (
    *(("report", "run", "--out", "out"), ("compare", "run", "run"), ("compare", "run", "--json")),
    *(("eval", "run", "-n", "1", "--max-bytes", "100", *ON_CPU), ("experts", "run", "--sequences", "4", *ON_CPU)),
    *(("plot", "run", "--out", "out"), RESUME, ("generate", "run/best", "-n", "1", *ON_CPU)),
)
CHECKPOINT_CALLS: tuple[Call, ...] = (
    *(("generate", FIRST, "-n", "1", *ON_CPU), ("upcycle", FIRST, "out", "--experts", "2", *ON_CPU)),
    *(("export", FIRST, "out", "--no-verify"), ("grow", FIRST, "out", "--n-layers", "2", *ON_CPU), RESUME),
    *(("generate", "run", "-n", "1", *ON_CPU), ("eval", "run", "-n", "0", "--max-bytes", "100", *ON_CPU)),
    ("train", "--from", FIRST, "--phases", "1", *TRAIN, "--out", "out"),
)
IN_THE_RUN = ("run",)
READERS = {
    "config": Reader(
        ["config.yaml"],
        [
            *(("params", "-c", "config.yaml"), ("plan", "-c", "config.yaml", "--machine", "M2 Max 32GB")),
            *(("train", "-c", "config.yaml", "--phases", "1", *TRAIN[2:], "--out", "out"), (*DESCRIBE, "-c", "config.yaml")),
        ],
        ["config.yaml"],
        share=4,
    ),
    "config-json": Reader(["config.json"], [("params", "-c", "config.json"), ("plan", "-c", "config.json")], ["config.json"]),
    "sweep": Reader(["sweep.yaml"], [("sweep", "sweep.yaml", "--dry-run")], ["sweep.yaml"], share=2),
    "sweep-folder": Reader(
        ["sweep/*.json*", "sweep/seed=0/*.json*", "sweep/seed=0/*.yaml"],
        [("compare", "sweep/seed=0", "sweep/seed=0"), ("plot", "sweep", "--out", "out"), ("fit", "sweep", "--out", "out")],
        ["sweep.yaml", "sweep"],
    ),
    "results": Reader(
        ["scaling/*.json*"], [("fit", "scaling", "--resamples", "20", "--out", "out"), ("plot", "scaling", "--out", "out")],
        ["scaling"], share=2,
    ),
    "model-config": Reader(
        ["model/config.json"], [IMPORT, IMPORT, IMPORT, GENERATE], ["models", "tokenizers"], prepare=choose_model, share=6
    ),
    "model-index": Reader(["model/*.index.json"], [IMPORT], ["models", "tokenizers"], prepare=choose_model, share=2),
    "model-weights": Reader(
        ["model/*.safetensors"], [IMPORT, IMPORT, GENERATE], ["models", "tokenizers"], prepare=choose_model, share=4
    ),
    "model-tokenizer": Reader(
        ["model/tokenizer.json"],
        [IMPORT, GENERATE, (*DESCRIBE, "--tokenizer", "model"), ("eval", "model", "--data", "text.jsonl", "-n", "1", *ON_CPU)],
        ["models", "tokenizers", "text.jsonl"], prepare=choose_model, share=6,
    ),
    "model-rest": Reader(
        ["model/tokenizer_config.json", "model/generation_config.json", "model/chat_template.jinja"],
        [IMPORT, GENERATE, (*DESCRIBE, "--tokenizer", "model")], ["models", "tokenizers"], prepare=choose_model, share=3,
    ),
    "text": Reader(
        ["text.jsonl", "text.txt", "text.parquet"],
        [
            *((*DESCRIBE, "--data", "text.jsonl"), (*DESCRIBE, "--data", "text.txt"), (*DESCRIBE, "--data", "text.parquet")),
            *((*DESCRIBE, "--data", "."), ("eval", FIRST, "-n", "0", "--data", "text.jsonl", *ON_CPU)),
            ("upcycle", FIRST, "out", "--experts", "2", "--router", "centroids", "--text", "text.jsonl", *ON_CPU),
        ],
        ["text.jsonl", "text.txt", "text.parquet", "run"], may_change=[CACHE], share=4,
    ),
    "parquet": Reader(["text.parquet"], [(*DESCRIBE, "--data", "text.parquet")], ["text.parquet"], [CACHE], share=2),
    "token-cache": Reader(
        [f"{CACHE}/**/*"],
        [RESUME, DESCRIBE, ("experts", "run", "--sequences", "4", *ON_CPU), ("train", *TRAIN, "--phases", "1", "--out", "out")],
        ["run", CACHE], may_change=[CACHE, *IN_THE_RUN], share=3,
    ),
    "run-logs": Reader(["run/*.jsonl"], RUN_CALLS, ["run"], IN_THE_RUN, share=5),
    "run-files": Reader(
        ["run/*.json", "run/*.yaml", "run/*.md", "run/boundaries/*", "run/tokenizer/*"], RUN_CALLS, ["run"], IN_THE_RUN, share=6
    ),
    "checkpoint": Reader(
        [f"{FIRST}/*", f"{LAST}/*"], CHECKPOINT_CALLS, ["run"], IN_THE_RUN, finish=list_anew, share=6
    ),
    "overrides": Reader([], [], ["run"], share=4),
    "options": Reader([], [], ["run", "model", "sweep.yaml", "sweep", "scaling", "text.jsonl"], IN_THE_RUN, share=8),
}  # fmt: skip


@dataclass
class Case:
    """What one case is: the folder that it runs in, and what it calls."""

    reader: Reader
    folder: Path
    argv: list[str]


def prepare(name: str, number: int, materials: Path, base: Path) -> Case:
    """Build a case in a folder under `base`, which is emptied first."""
    reader, random = READERS[name], Random(f"{name}:{number}")
    shutil.rmtree(base, ignore_errors=True)
    folder = base / "a" / "b" / "here"
    folder.mkdir(parents=True)
    for needed in reader.needs:
        source = materials / needed
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / needed)
    for link, target in {"circle": "circle", "zero": "/dev/zero"}.items():
        (folder / link).symlink_to(target)
    os.mkfifo(folder / "fifo")
    (base / "home").mkdir()
    (base / "tmp").mkdir()
    if reader.prepare:
        reader.prepare(folder, random)
    if name == "overrides":
        return Case(reader, folder, odd_override(folder, random))
    if name == "options":
        return Case(reader, folder, odd_option(random))
    found = sorted(path for pattern in reader.files for path in folder.glob(pattern) if path.is_file())
    for path in random.sample(found, min(len(found), random.choice((1, 1, 1, 2)))):
        mutate_file(path, random)
        if path.is_file() and path.suffix == ".yaml":  # compiling takes longer than a refusal may, as was asked for
            path.write_bytes(
                re.sub(rb"""(compile["']?:\s*)true""", rb"\1false", path.read_bytes(), flags=re.IGNORECASE)
            )
    if reader.finish:
        reader.finish(folder, random)
    return Case(reader, folder, list(random.choice(reader.calls)))


def odd_override(folder: Path, random: Random) -> list[str]:
    """A call with `-o KEY=VALUE`, of a key that there is or nearly is."""
    import yaml

    keys = list(leaves(yaml.safe_load((folder / "run" / "config.yaml").read_text())))
    key = random.choice(keys)
    if random.random() < 0.1:
        key = random.choice((key[:-1], key + ".x", key.partition(".")[0], "", ".", "a" * 1000, *TEXTS))
    value = str(
        random.choice((random.choice(TEXTS), *random.sample(YAML_RAWS, 3), *map(str, random.sample(ODD_NUMBERS, 3))))
    )
    call = random.choice(
        (
            ("params",),
            ("plan", "--machine", "M2 Max 32GB"),
            ("train", "--phases", "1", *TRAIN, "--out", "out"),
            DESCRIBE[:-2],
        )
    )
    more = ["-o", f"{key}={value}"] if "\0" not in key + value else []
    return [*call, *more, *(["--out", "out"] if call == DESCRIBE[:-2] else [])]


def leaves(values: dict[str, Any], before: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{before}{key}.")
        yield before + key


ODD_NUMBERS = (
    "0",
    "-1",
    "1",
    "3",
    "1.5",
    "nan",
    "inf",
    "-inf",
    "1e-320",
    "1e308",
    "1e999",
    "9" * 5000,
    str(2**31),
    str(2**63),
)
ODD_NUMBERS += ("-9223372036854775809", "99999999999999999999", "0x10", "1_000", "９", "1e6", "1000000000000", "١")
ODD_WORDS = tuple(text for text in TEXTS if "\0" not in text and text != "/")
ODD_WORDS += (
    "odd\udcff",
    "-",
    "--",
    ",",
    "1,2",
    "3,2,1",
    "run",
    "run/best",
    "model",
    "text.jsonl",
    "sweep",
    "config.yaml",
)
# A great number of these is a great amount of work, which is what was asked for.
WORK = ("--steps", "--max-new-tokens", "--resamples")
# Where outputs go is another test's subject; a self test takes a minute.
LEFT_OUT = ("out", "html", "help", "self_test")


def odd_option(random: Random) -> list[str]:
    """A call of any command with an option, or an argument, that has an odd value."""
    command = random.choice(COMMANDS)
    if command.name == "parity":  # a minute of work where nothing is wrong, so there is nothing to judge
        command = replace(command, arguments=("nowhere",))
    argv = command.argv("out" if command.output else None)
    if command.name == "sweep":
        argv = ["sweep", "sweep.yaml", "--dry-run"]
    if random.random() < 0.15 and command.arguments and not command.arguments[0].startswith("-"):
        argv[len(command.name.split())] = random.choice(ODD_WORDS)
        return argv
    options = [option for option in options_of(command.name) if option.name not in LEFT_OUT]
    if not options:
        return argv
    option = random.choice(options)
    name = random.choice(option.opts)
    if option.is_flag:
        return [*argv, name]
    value = random.choice(ODD_NUMBERS if random.random() < 0.5 else ODD_WORDS)
    if option.opts[0] in WORK and _is_much(value):
        value = "-5"
    return [*argv, name, value]


def _is_much(value: str) -> bool:
    with contextlib.suppress(ValueError):
        return int(value) > 100  # as the options read it: 1_000 is a number, too
    return False


@cache
def options_of(name: str) -> list[Any]:
    import typer

    import cli

    group: Any = typer.main.get_command(cli.app)
    for word in name.split():
        group = group.commands[word]
    return [parameter for parameter in group.params if parameter.param_type_name == "option"]


def run_case(name: str, number: int, materials: Path, base: Path) -> tuple[list[str], list[str]]:
    """What is called, and what is wrong with how it ends."""
    case = prepare(name, number, materials, base)
    before, began = snapshot(base), time.process_time()
    cache = case.folder / CACHE if (case.folder / CACHE).is_dir() else materials.parent / CACHE
    outcome = run_here(
        case.argv, case.folder, {"MLXMOE_CACHE": str(cache), "HOME": str(base / "home"), "TMPDIR": str(base / "tmp")}
    )
    seconds = time.process_time() - began
    wrong = faults(outcome)
    if seconds > SLOW:
        wrong.append(f"slow: {seconds:.1f} s of computing, exit code {outcome.code}: {outcome.err[-300:]}")
    return case.argv, wrong + trespasses(case, outcome, before, base)


def faults(outcome: Outcome) -> list[str]:
    """What is wrong with what a command said."""
    if outcome.crash:
        return [f"a crash: {outcome.crash}"]
    wrong = []
    lines = [line for line in outcome.err.splitlines() if not line.startswith("warning: ")]
    if outcome.code not in (0, 1, 2):
        wrong.append(f"exit code {outcome.code}: {outcome.err[-500:]}")
    if outcome.code == 2 and not any(line.startswith(("error: ", "Error: ")) for line in lines):
        wrong.append(f"exit code 2 without an error: {outcome.err[-500:]}")
    if len(lines) > MOST_LINES or any(len(line) > LONGEST_LINE for line in lines):
        longest = max(map(len, lines))
        wrong.append(f"unreadable: {len(lines)} lines, the longest of {longest} characters: {outcome.err[:500]}")
    said = outcome.out + outcome.err
    if steering := {character for character in said if ord(character) < 32 and character not in "\n\t"} | (
        set(said) & {"\u202e", "\x7f", "\x9b"}
    ):
        wrong.append(f"control characters reach the terminal: {sorted(steering)}: {said[-300:]!r}")
    if "Warning: " in outcome.err or "Traceback" in outcome.err:
        wrong.append(f"a library speaks: {outcome.err[-500:]}")
    return wrong


def trespasses(case: Case, outcome: Outcome, before: dict[str, str], base: Path) -> list[str]:
    """Which files a command changed, or wrote, that it should not have."""
    after = snapshot(base)
    here = str(case.folder.relative_to(base))
    allowed = [
        "tmp/mlx",
        *(f"{here}/{name}" for name in case.reader.may_change),
    ]  # MLX keeps its compiled kernels there
    if outcome.code != 2:
        allowed.append(f"{here}/out")
    touched = [change.split(": ")[0] for change in lost(before, after)] + sorted(after.keys() - before.keys())
    wrong = [name for name in touched if not any(name == place or name.startswith(place + "/") for place in allowed)]
    wrong += [name for name in after if ".mlxmoe-" in name and name not in wrong]
    if not stat.S_ISCHR(os.stat("/dev/zero").st_mode):  # links in the materials lead to it
        wrong.append("/dev/zero")
    if OUTSIDE.exists() or OUTSIDE.is_symlink():
        wrong.append(str(OUTSIDE))
        shutil.rmtree(OUTSIDE, ignore_errors=True)
        OUTSIDE.unlink(missing_ok=True)
    return [f"wrote, with exit code {outcome.code}: {', '.join(wrong[:5])}: {outcome.err[-300:]}"] if wrong else []


def materials_for_fuzzing(folder: Path) -> Path:
    """Build what the readers need beside the common materials."""
    materials = folder / "materials"
    build(materials, folder / CACHE)
    environment = {"MLXMOE_CACHE": str(folder / CACHE)}
    for argv in (["experts", "run", *ON_CPU], ["fit", "scaling", "--resamples", "20"]):
        outcome = run_here(argv, materials, environment)
        assert outcome.code == 0, outcome
    shutil.copytree(folder / CACHE, materials / CACHE)
    shutil.copy(materials / "run" / "config.yaml", materials / "config.yaml")
    import yaml

    (materials / "config.json").write_text(json.dumps(yaml.safe_load((materials / "config.yaml").read_text())))
    texts = [f"Once upon a time there was a dog, and it had {number} legs. " * 20 for number in range(60)]
    (materials / "text.jsonl").write_text("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in texts))
    (materials / "text.txt").write_text("\n<|endoftext|>\n".join(texts))
    import pyarrow as pa
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.table({"text": texts}), materials / "text.parquet")
    from support import published_models

    for name in MODELS:
        options = {"max_shard_size": "20KB"} if name == "llama3" else {}
        (materials / "models").mkdir(exist_ok=True)
        published_models.save(name, materials / "models" / name, **options)
    for name in TOKENIZERS:
        save_tokenizer(name, materials / "tokenizers" / name, materials / "run" / "tokenizer", texts)
    return materials


def save_tokenizer(kind: str, folder: Path, char: Path, texts: list[str]) -> None:
    """Write a tokenizer of some kind, and what comes beside one."""
    from support import published_models
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    folder.mkdir(parents=True)
    published_models.save_tokenizer(folder)
    (folder / "generation_config.json").write_text('{"bos_token_id": 1, "eos_token_id": 2}')
    if kind == "words":
        return
    if kind == "char":
        for file in char.iterdir():
            shutil.copy(file, folder / file.name)
        return
    special = ["<unk>", "<s>", "</s>"]
    if kind == "bpe":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        trainer: Any = trainers.BpeTrainer(vocab_size=96, special_tokens=special, show_progress=False)
    else:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))


class Worker:
    """A process that runs one case after the other, watched from here."""

    def __init__(self, materials: Path, base: Path):
        self.materials, self.base, self.done = materials, base, 0
        self.log = base.with_suffix(".log")
        self.case: tuple[str, int] | None = None
        self._start()

    def _start(self) -> None:
        self.pipe, theirs = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=work, args=(theirs, self.materials, self.base, self.log), daemon=True)
        self.process.start()
        theirs.close()

    def begin(self, case: tuple[str, int]) -> None:
        if self.done >= CASES_OF_A_PROCESS:
            self.end()
            self._start()
            self.done = 0
        self.case, self.began, self.done = case, time.monotonic(), self.done + 1
        self.pipe.send(case)

    def look(self) -> list[str] | None:
        """What is wrong with the case, once it has ended, of itself or not."""
        assert self.case is not None
        if self.pipe.poll():
            try:
                _, wrong = self.pipe.recv()
                return list(wrong)
            except EOFError:
                self.process.join()
                code = self.process.exitcode or 0
                how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                return self._replace(f"the process ended: {how}: {self.log.read_text(errors='replace')[-800:]}")
        if time.monotonic() - self.began > HANG:
            return self._replace(f"no end after {HANG:.0f} s")
        if resident_bytes(self.process.pid) > MEMORY:
            return self._replace(f"more than {MEMORY >> 30} GB of memory")
        return None

    def _replace(self, why: str) -> list[str]:
        self.process.kill()
        self.process.join()
        self._start()
        return [why]

    def end(self) -> None:
        self.process.kill()
        self.process.join()


def work(pipe: Any, materials: Path, base: Path, log: Path) -> None:
    """Run the cases that come through a pipe; what libraries write by themselves goes to a log."""
    with log.open("wb") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    sys.stdin = open(os.devnull)  # noqa: SIM115
    while True:
        try:
            name, number = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(run_case(name, number, materials, base))
        except Exception:
            pipe.send(([], [f"the harness itself: {traceback.format_exc()}"]))


def resident_bytes(process: int | None) -> int:
    """The memory that a process holds; 0 where the system does not say."""
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def cases(seed: int) -> Iterator[tuple[str, int]]:
    """All readers in turn, each as often as its share says, with numbers that no other seed has."""
    numbers = {name: count(seed * 1_000_000) for name in READERS}
    while True:
        for turn in range(max(reader.share for reader in READERS.values())):
            yield from ((name, next(numbers[name])) for name, reader in READERS.items() if turn < reader.share)


def fuzz(
    materials: Path, base: Path, wanted: Iterator[tuple[str, int]], n_workers: int
) -> Iterator[tuple[str, int, list[str]]]:
    """Run cases, and yield each with what is wrong. One that took too long is tried once more: the machine may be busy."""
    workers = [Worker(materials, base / f"w{number}") for number in range(n_workers)]
    again: list[tuple[str, int]] = []
    tried_again: set[tuple[str, int]] = set()
    idle, busy = list(workers), list[Worker]()
    try:
        while True:
            while idle and (case := again.pop() if again else next(wanted, None)):
                idle[-1].begin(case)
                busy.append(idle.pop())
            if not busy:
                return
            multiprocessing.connection.wait([worker.pipe for worker in busy], timeout=0.2)
            for worker in list(busy):
                if (wrong := worker.look()) is None:
                    continue
                busy.remove(worker)
                idle.append(worker)
                assert worker.case is not None
                if wrong and wrong[0].startswith(("no end", "slow")) and worker.case not in tried_again:
                    again.append(worker.case)
                    tried_again.add(worker.case)
                else:
                    yield (*worker.case, wrong)
    finally:
        for worker in workers:
            worker.end()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--cases", type=int, help="Instead of a time.")
    parser.add_argument("--seed", type=int, help="Of all cases; another one each time by default.")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--reader", choices=READERS, action="append", help="Only this one; repeatable.")
    parser.add_argument("--case", help="READER:NUMBER, to run in this process; its folder is kept.")
    parser.add_argument("--materials", type=Path, help="Where to keep the materials, or where they were kept.")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else int(time.time()) % 1_000_000
    with tempfile.TemporaryDirectory(prefix="mlxmoe-fuzz-") as name:
        kept = options.materials or Path(name)
        materials = kept / "materials" if (kept / "materials").is_dir() else materials_for_fuzzing(kept)
        if options.case:
            return run_again(options.case, materials)
        deadline, n_cases, found = (
            time.monotonic() + options.seconds,
            Counter[str](),
            list[tuple[str, int, list[str]]](),
        )
        chosen = (case for case in cases(seed) if not options.reader or case[0] in options.reader)
        in_time = takewhile(lambda _: time.monotonic() < deadline, chosen)
        wanted = islice(chosen, options.cases) if options.cases else in_time
        for reader, number, wrong in fuzz(materials, Path(name), wanted, options.workers):
            n_cases[reader] += 1
            if wrong:
                found.append((reader, number, wrong))
                print(describe(reader, number, wrong), flush=True)
    print(f"{sum(n_cases.values())} cases, seed {seed}, {len(found)} with faults: {dict(n_cases)}")
    return 1 if found else 0


def describe(reader: str, number: int, wrong: list[str]) -> str:
    lines = "\n  ".join("\n  ".join(fault.splitlines()) for fault in wrong)
    return f"{reader}:{number}\n  {lines}\n  again: python tests/faults/fuzz.py --case {reader}:{number}\n"


def run_again(case: str, materials: Path) -> int:
    """Run one case in this process, and keep its folder."""
    name, number = case.split(":")
    base = Path(tempfile.mkdtemp(prefix="mlxmoe-case-"))
    argv, wrong = run_case(name, int(number), materials, base / "w")
    print(f"cd {base / 'w' / 'a' / 'b' / 'here'}; mlxmoe {shlex.join(argv)}")
    print("\n".join(wrong) or "nothing is wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
