"""Give bad input to real commands, one process each, and time their refusals.

    python benchmarks/refusals.py
    python benchmarks/refusals.py --only tokenizer --limit 60

Each row is one input. The command must print one line on standard error, end with the row's exit code within the limit,
and leave every file unchanged. Exit code 0 in a row means that the command can work without that input: it warns, and
writes its output. Exit code 0 of the script: all rows passed. Prints a line for each row, then the slowest refusal.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "faults"))
sys.path.insert(0, str(ROOT))

from commands import ON_CPU, SIZE, TRAIN  # noqa: E402
from materials import build, copy  # noqa: E402
from trees import snapshot  # noqa: E402

TIMEOUT_SECONDS = 60.0
ODD_YAML = ("!!timestamp x", "2024-13-01", '!!int ""', "!!float abc", "!!bool maybe")
LONG = "a" * 300
DIGITS = "1" + "0" * 5_000
NESTED = "[" * 10_000 + "]" * 10_000
TRAIN_ONE = ["train", "--phases", "1", *TRAIN, "--out", "out"]
SIZE_ONLY = [word for override in SIZE if not override.startswith("data.") for word in ("-o", override)]
TRAIN_ON = ["train", "--phases", "1", "--preset", "llama", "--steps", "2", *ON_CPU, *SIZE_ONLY, "--out", "out"]
TRAIN_CHARS = [*TRAIN_ON, "--tokenizer", "char"]
# The run in the materials has ended after two phases, so resume to the third.
RESUME = ["train", "--resume", "run", "--phases", "3"]


@dataclass(frozen=True)
class Row:
    """A bad input. `prepare` changes the folder before the command runs; standard error must contain `says`."""

    name: str
    argv: list[str]
    prepare: Callable[[Path], Any] = lambda folder: None
    code: int = 2
    says: str = ""
    before: str = ""  # shell commands to run first


def edit(name: str, **keys: Any) -> Callable[[Path], None]:
    """Set keys of a JSON file, None included; `...` deletes a key."""

    def change(folder: Path) -> None:
        values = json.loads((folder / name).read_text()) | keys
        (folder / name).write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))

    return change


def write(name: str, content: str | bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def replace(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text, (name, old)
        (folder / name).write_text(text.replace(old, new, 1))

    return change


def append(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: write(name, (folder / name).read_bytes() + content)(folder)


def tensors(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        held = {key: array.copy() for key, array in load_file(folder / name).items()}
        change(held)
        save_file(held, folder / name, {"format": "pt"})

    return rewrite


def damaged(value: float) -> Callable[[dict[str, Any]], None]:
    return lambda held: next(array for key, array in sorted(held.items()) if "up_proj" in key).__setitem__(
        (1, 2), value
    )


def both(*changes: Callable[[Path], Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for each in changes:
            each(folder)

    return change


def in_cache(change: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Apply the change to the only entry of the token cache."""
    return lambda folder: change(next(path for path in (folder / "cache").iterdir() if path.is_dir()))


def importing() -> Iterator[Row]:
    argv, config = ["import", "model", "out"], "model/config.json"
    for kind in (np.float64, np.int8):
        tied = tensors("model/model.safetensors", lambda held, kind=kind: held.update(lm_head_of(held, kind)))
        yield Row(f"import: tied head in {kind.__name__}", argv, both(edit(config, tie_word_embeddings=True), tied))
    index = json.dumps({"weight_map": {"model.norm.weight": f"{LONG}.safetensors"}})
    yield Row("import: index with a name of 300 characters", argv, write("model/model.safetensors.index.json", index))
    for key, value in (("num_hidden_layers", 10**9), ("num_hidden_layers", 10**30), ("hidden_size", 10**12 + 1)):
        yield Row(f"import: {key} {value:.0e}", argv, edit(config, **{key: value}))
    mixtral = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_experts_per_tok": 2}
    yield Row("import: 1e9 experts", argv, edit(config, **mixtral, num_local_experts=10**9, mlp_bias=...))
    yield Row("import: integer of 5,000 digits", argv, replace(config, '"vocab_size": 60', f'"vocab_size": {DIGITS}'))
    qwen = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}
    for layers in ("all", 3):
        keys = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "norm_topk_prob": True}
        yield Row(
            f"import: mlp_only_layers {layers!r}",
            argv,
            edit(config, **qwen, **keys, mlp_only_layers=layers),
            says="mlp_only_layers",
        )
    for value in (np.nan, np.inf):
        change = tensors("model/model.safetensors", damaged(value))
        yield Row(f"import: {value} in weights", argv, change, says="NaN or Inf")
    link = lambda folder: (folder / "model/chat_template.jinja").symlink_to("/etc/hostname")  # noqa: E731
    yield Row("import: chat template that is a link", argv, link, says="link")
    for place in (["import", LONG, "out"], ["import", "model", LONG], ["import", "~no-such-user/x", "out"]):
        yield Row(f"import: {place[1][:12]} {place[2][:12]}", place)


def lm_head_of(held: dict[str, Any], kind: Any) -> dict[str, Any]:
    return {"lm_head.weight": held["model.embed_tokens.weight"].astype(kind)}


def tokenizers() -> Iterator[Row]:
    argv, file = ["import", "model", "out"], "model/tokenizer_config.json"
    for value in (7, ["</s>"], {"content": 7}):
        yield Row(f"tokenizer: eos_token {value}", argv, edit(file, eos_token=value))
    yield Row("tokenizer: eos_token half a pair", argv, write(file, '{"eos_token": "\\ud800"}'))
    yield Row("tokenizer: nested 10,000 deep", argv, write(file, f'{{"eos_token": {NESTED}}}'))
    unigram = {"type": "Unigram", "vocab": [["a", -1.0], ["b", -2.0]], "unk_id": None}
    unknown = both(edit("model/tokenizer.json", model=unigram), write("d.txt", "abc\n"))
    own = [*TRAIN_ON, "--tokenizer", "model"]
    yield Row("tokenizer: unigram without unk", [*own, "--data", "d.txt"], unknown, says="unknown token")
    junk = {"type": "Precompiled", "precompiled_charsmap": "AAAA////"}
    yield Row("tokenizer: charsmap of junk", argv, edit("model/tokenizer.json", normalizer=junk))
    fixed = {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None}
    padding = {**fixed, "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
    yield Row("tokenizer: padding to 1e9", argv, edit("model/tokenizer.json", padding=padding), code=0)
    longer = {"type": "Replace", "pattern": {"Regex": "."}, "content": "x" * 1_000}
    many = {"type": "Sequence", "normalizers": [longer] * 4}
    yield Row("tokenizer: normalizer that multiplies", argv, edit("model/tokenizer.json", normalizer=many))
    text = write("d.txt", "".join(f"{letter * 40_000}!\n<|endoftext|>\n" for letter in "ax"))
    for pattern in ("(a+)+$", "(?:a|aa)+$", "(x+x+)+z"):
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        change = both(text, edit("model/tokenizer.json", pre_tokenizer=split))
        yield Row(f"tokenizer: split by {pattern}", [*own, "--data", "d.txt"], change, says="cannot encode")


def configs() -> Iterator[Row]:
    argv = ["train", "-c", "c.yaml", "--out", "out", *ON_CPU]
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    texts = {
        "aliases that multiply": f"{bomb}model: {{n_layers: *i}}",
        "start without phases": "start: {model: x, phases: []}",
        "integer of 5,000 digits": f"seed: {DIGITS}",
        "a name with ..": "name: ../../x",
        "an absolute name": "name: /tmp/x",
        "a name of 300 characters": f"name: {LONG}",
        "a name with NUL": 'name: "a\\0b"',
    }
    for value in ODD_YAML:
        texts[value] = f"optimizer: {{weight_decay: {value}}}"
    for name, text in texts.items():
        yield Row(f"config: {name}", argv[:3] + argv[5:] if "name" in name else argv, write("c.yaml", text))
    yield Row("config: bytes that steer a terminal", argv, write("c.yaml", 'name: "\\e[31m[/b][red]x/"'))
    for value in (*ODD_YAML, "[" * 1_000):
        yield Row(f"-o model.d_model={value[:15]}", ["params", "-o", f"model.d_model={value}"])
    yield Row("plan: batch of 1e12", ["plan", "-o", "training.batch_size=1000000000000"])
    yield Row("params: 1e9 layers", ["params", "-o", "model.n_layers=1000000000"])


def commands() -> Iterator[Row]:
    dense, experts = "run/phases/1-dense", "run/phases/2-moe"
    for value in (np.nan, np.inf):
        for backend in ("torch", "mlx"):
            change = tensors("model/model.safetensors", damaged(value))
            argv = ["generate", "model", "--prompt", "Once", "--backend", backend]
            yield Row(f"generate: {value} in weights, {backend}", argv, change, says="NaN or Inf")
    generate = ["generate", dense, "-n", "2", *ON_CPU]
    for option, value in (("--temperature", "1e-320"), ("--seed", "-1"), ("--prompt", os.fsdecode(b"a\xff"))):
        yield Row(f"generate: {option} {value!a}", [*generate, option, value])
    yield Row("upcycle: 1e9 experts", ["upcycle", dense, "out", "--experts", "1000000000"])
    yield Row("grow: width 1e9", ["grow", experts, "out", "--d-model", "1000000000"])
    yield Row("grow: depth 1e9", ["grow", experts, "out", "--n-layers", "1000000000"])
    for option in ("--data", "--tokenizer", "--from"):
        yield Row(f"train: {option} ~no-such-user/x", [*TRAIN_ON, option, "~no-such-user/x"])
    yield Row("train: MLXMOE_CACHE=~no-such-user", TRAIN_ONE, before="export MLXMOE_CACHE='~no-such-user/x'")
    yield Row("train: --out of 300 characters", [*TRAIN_ONE[:-1], LONG])
    yield Row("train: --resume of 300 characters", ["train", "--resume", LONG])
    yield Row("train: --out ~no-such-user/x", [*TRAIN_ONE[:-1], "~no-such-user/x"])
    yield Row("generate: no memory, mlx", ["generate", dense, "--backend", "mlx"], before="ulimit -v 400000")
    for limit in (100_000, 500_000):
        yield Row(f"train: {limit // 1000} MB of memory", TRAIN_ONE, before=f"ulimit -v {limit}", says="memory")
    change = write("model/model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    yield Row("parity: a git-lfs pointer", ["parity", "--model", "model"], change, says="git-lfs")
    yield Row("import: a git-lfs pointer", ["import", "model", "out"], change, says="git-lfs")


def data() -> Iterator[Row]:
    import pyarrow as arrow
    from pyarrow import parquet

    def table(array: Any) -> Callable[[Path], None]:
        return lambda folder: parquet.write_table(arrow.table({"text": array}), folder / "d.parquet")

    digits = write("d.jsonl", f'{{"text": "a", "n": {DIGITS}}}\n')
    yield Row("data: JSONL with 5,000 digits", [*TRAIN_CHARS, "--data", "d.jsonl"], digits)
    bad = arrow.array([b"a\xff"] * 9, arrow.binary()).view(arrow.string())
    yield Row("data: Parquet that is no UTF-8", [*TRAIN_CHARS, "--data", "d.parquet"], table(bad))
    bomb = arrow.DictionaryArray.from_arrays(np.zeros(2_000_000, np.int32), ["x" * 12_000])
    yield Row("data: Parquet of 24 GB in little", [*TRAIN_CHARS, "--data", "d.parquet"], table(bomb))
    pointer = write("d.txt", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    yield Row("data: a git-lfs pointer", [*TRAIN_CHARS, "--data", "d.txt"], pointer, says="git-lfs")
    yield Row("eval: one letter of text", ["eval", "run", "--data", "d.txt", *ON_CPU], write("d.txt", "x"))
    yield Row("data: a FIFO", [*TRAIN_CHARS, "--data", "d.txt"], lambda folder: os.mkfifo(folder / "d.txt"))
    link = lambda folder: (folder / "d.txt").symlink_to("/dev/zero")  # noqa: E731
    yield Row("data: a link to /dev/zero", [*TRAIN_CHARS, "--data", "d.txt"], link)
    for backend in ("torch", "mlx"):
        argv = [*TRAIN_ONE, "--backend", backend]
        beyond = in_cache(
            lambda entry: np.full(os.stat(entry / "train.bin").st_size // 2, 60_000, "<u2").tofile(entry / "train.bin")
        )
        yield Row(f"cache: ids beyond the vocabulary, {backend}", argv, beyond, code=0, says="made anew")
    yield Row("cache: meta.json without source", TRAIN_ONE, in_cache(edit("meta.json", source=...)), 0, "made anew")
    yield Row("cache: meta.json nested", TRAIN_ONE, in_cache(write("meta.json", NESTED)), 0, "made anew")
    flipped = in_cache(lambda entry: np.memmap(entry / "train.bin", "<u2", "r+").__setitem__(5, 3))
    yield Row("cache: another valid id", TRAIN_ONE, flipped, 0, "made anew")


def runs() -> Iterator[Row]:
    step = "run/phases/2-moe/checkpoints/step-2"
    last = {"phase": 2, "step": 2}
    report = ["report", "run", "--out", "r.html"]
    for name, line in (
        ("a row nested 10,000 deep", NESTED.encode()),
        ("a line of 200 MB", b'{"a": "' + b"x" * (200 << 20) + b'"}'),
        ("a row without step_ms", json.dumps(last).encode()),
    ):
        yield Row(f"report: {name}", report, append("run/metrics.jsonl", line + b"\n"), 0, "warning: ")
    shape = write("run/boundaries/1-2.json", '{"a": [1]}')
    yield Row("report: a boundary of another shape", report, shape, 0, "warning: ")
    samples = append("run/history.jsonl", b'{"event": "samples", "phase": 1, "step": 2, "samples": {"\\ud800": "x"}}\n')
    yield Row("report: half a pair in samples", report, samples, 0, "warning: ")
    nan = replace("run/metrics.jsonl", '"loss": ', '"loss": NaN, "old": ')
    yield Row("report: NaN in metrics", report, nan, 0, "warning: ")
    yield Row("compare: NaN in metrics", ["compare", "run", "sweep/seed=0"], nan, 0)
    yield Row(
        "plot: a loss of 1e308",
        ["plot", "run", "--out", "p"],
        replace("run/metrics.jsonl", '"loss": ', '"loss": 1e308, "old": '),
        0,
    )
    for name, tail in (("blank", b"\n\n"), ("torn", b'{"phase": 2, "st'), ("NUL", b"\0" * 40 + b"\n")):
        yield Row(f"resume: a {name} line in metrics", RESUME, append("run/metrics.jsonl", tail), 0)
    yield Row("resume: no run.json", RESUME, lambda folder: (folder / "run/run.json").unlink(), says="run.json")
    yield Row("resume: data.json = {}", RESUME, write("run/data.json", "{}"))
    moments = tensors(f"{step}/optimizer.safetensors", lambda held: held.update(_float64(held)))
    yield Row("resume: moments in float64", RESUME, both(moments, sealed(step)))
    spare = lambda folder: shutil.copytree(folder / "run/phases/1-dense", folder / "run/phases/backup")  # noqa: E731
    yield Row("resume: a copy beside the phases", RESUME, spare, 0)
    yield Row(
        "generate: manifest without a file",
        ["generate", step, *ON_CPU],
        edit(f"{step}/manifest.json", **{"optimizer.safetensors": ...}),
    )
    alter = append(f"{step}/optimizer.safetensors", b"x")
    yield Row("generate: an altered file", ["generate", step, *ON_CPU], alter)
    other = both(edit(f"{step}/trainer.json", phase=1), sealed(step))
    yield Row("generate: another phase than its folder's", ["generate", step, *ON_CPU], other)
    layers = both(edit(f"{step}/config.json", n_layers=2), sealed(step))
    yield Row("generate: another n_layers than its tensors", ["generate", step, *ON_CPU], layers)
    yield Row(
        "resume: config.yaml with another n_layers", RESUME, replace("run/config.yaml", "n_layers: 1", "n_layers: 2")
    )


def _float64(held: dict[str, Any]) -> dict[str, Any]:
    return {name: array.astype(np.float64) for name, array in held.items()}


def sealed(step: str) -> Callable[[Path], None]:
    """Update a checkpoint's manifest to its files' current sizes and hashes."""

    def change(folder: Path) -> None:
        from mlx_moe.storage.tensor_files import sha256

        manifest = folder / step / "manifest.json"
        names = json.loads(manifest.read_text())
        files = {name: folder / step / name for name in names}
        stated = {name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for name, file in files.items()}
        manifest.write_text(json.dumps(stated))

    return change


def sweeps() -> Iterator[Row]:
    argv = ["sweep", "s.yaml", *ON_CPU, "--out", "out"]
    head = "name: s\npreset: llama\n"
    axes = "".join(f"  training.seed{n}: [{', '.join(map(str, range(1_000)))}]\n" for n in range(3))
    for name, text in (
        ("1e9 combinations", f"{head}axes:\n{axes}"),
        ("a date for a number", f"{head}overrides: {{optimizer.weight_decay: 2024-01-01}}\naxes: {{seed: [0]}}\n"),
        ("equal: 3", f"{head}equal: 3\naxes: {{seed: [0]}}\n"),
        ("a variant without a name", f'{head}axes: {{arm: {{"": {{seed: 1}}}}}}\n'),
        ("a variant ..", f'{head}axes: {{arm: {{"..": {{seed: 1}}}}}}\n'),
        ("a variant logs", f"{head}axes: {{arm: {{logs: {{seed: 1}}}}}}\n"),
        ("integer of 5,000 digits", f"{head}axes: {{seed: [{DIGITS}]}}\n"),
    ):
        yield Row(f"sweep: {name}", argv, write("s.yaml", text))
    for value in ('"a"', "NaN", "Infinity", DIGITS):
        change = replace(
            "scaling/results.jsonl", '"parameters_non_embedding": ', f'"parameters_non_embedding": {value}, "x": '
        )
        yield Row(
            f"fit: {value[:9]} for parameters", ["fit", "scaling", "--resamples", "20", "--out", "f.json"], change
        )


def refused(row: Row, materials: Path, cache: Path, limit: float) -> tuple[float, list[str]]:
    """Return the seconds that a row took, and the faults of its answer."""
    with tempfile.TemporaryDirectory() as place:
        folder = copy(materials, Path(place) / "work")
        shutil.copytree(cache, folder / "cache")
        row.prepare(folder)
        before = _own(snapshot(folder))
        environment = os.environ | {"MLXMOE_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
        command = [sys.executable, "-m", "cli", *row.argv]
        shell = ["bash", "-c", f'{row.before or ":"}; exec "$@"', "bash", *command]
        started = time.perf_counter()
        try:
            result = subprocess.run(
                shell,
                cwd=folder,
                env=environment | {"PYTHONPATH": str(ROOT)},
                capture_output=True,
                timeout=TIMEOUT_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return TIMEOUT_SECONDS, [f"not over after {TIMEOUT_SECONDS:.0f} s"]
        seconds = time.perf_counter() - started
        after = {} if row.code == 0 else _own(snapshot(folder))
    err = result.stderr.decode(errors="backslashreplace")
    said = [line for line in err.splitlines() if row.code == 0 or not line.startswith("warning: ")]
    wrong = []
    if result.returncode != row.code:
        wrong.append(f"exit code {result.returncode} in place of {row.code}")
    if row.code and (len(said) != 1 or not said[0].startswith("error: ")):
        wrong.append("not one line")
    if "Traceback" in err or "unexpected " in err or "\033" in err:
        wrong.append("a crash")
    if row.says not in err + (result.stdout.decode(errors="replace") if row.code == 0 else ""):
        wrong.append(f"does not say {row.says!r}")
    if row.code and after != before:
        wrong.append(f"changed: {sorted(set(after.items()) ^ set(before.items()))[:3]}")
    if row.code and seconds > limit:
        wrong.append(f"more than {limit:g} s")
    return seconds, [*wrong, err[-400:]] if wrong else []


def _own(files: dict[str, str]) -> dict[str, str]:
    """Return the user's files, without the token cache, which a command may repair."""
    return {name: content for name, content in files.items() if not name.startswith("cache/")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows with this in their name")
    parser.add_argument("--limit", type=float, default=5.0, help="seconds that a refusal may take")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        materials, cache = Path(place) / "materials", Path(place) / "cache"
        build(materials, cache)
        groups = (importing, tokenizers, configs, commands, data, runs, sweeps)
        rows = [row for group in groups for row in group() if options.only in row.name]
        slowest, faults = (0.0, ""), 0
        for row in rows:
            seconds, wrong = refused(row, materials, cache, options.limit)
            slowest = max(slowest, (seconds, row.name) if row.code else slowest)
            faults += bool(wrong)
            print(f"{seconds:6.2f} s  {'; '.join(wrong) or 'ok'}  {row.name}", flush=True)
    print(f"{len(rows)} rows, {faults} faults, slowest refusal {slowest[0]:.2f} s ({slowest[1]})")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
