"""Upcycling and growth on disk: seconds, memory and bytes, compared with `cp` of the output.

    python benchmarks/transfers.py [MODEL ...] [--backend mlx] [--rounds 3] [--mergekit VENV/bin/mergekit-moe]

A MODEL is a checkpoint or a Hugging Face folder; without one, 100 M random parameters. Each round runs a command and
copies its output; figures are medians. Prints a line for each and JSON. Linux only: memory is read from /proc.

==========  ==========================================================================================
transfer    seconds until the file is written, hashed and flushed, without the certificate
certified   seconds of the certificate, including loading the backend
all         seconds of the command
memory      the largest resident set, including mapped files; in brackets its anonymous part beyond that
            of the process with the backend loaded, over the largest tensor written
cp, sync    seconds of `cp`, and of a `sync` after it, which the transfer includes, too
==========  ==========================================================================================

With --mergekit, mergekit-moe also makes 8 experts of a Llama MODEL, and both outputs are compared with the dense
model's logits in transformers.
"""

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from mlx_moe.convert.probes import checkpoint_probes
from mlx_moe.hub.models import open_model
from mlx_moe.parameters import initialize, shapes
from mlx_moe.presets import load_run
from mlx_moe.storage import checkpoint
from mlx_moe.storage.checkpoint import TrainerState
from mlx_moe.training.backend import TRAINERS, choose_backend

MLXMOE = Path(sys.executable).parent / "mlxmoe"
MERGEKIT = "base_model: {0}\ngate_mode: random\ndtype: float32\nexperts_per_token: 2\nexperts:\n" + (
    "  - source_model: {0}\n" * 8
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path, metavar="MODEL")
    parser.add_argument("--backend", default="auto", choices=["auto", "mlx", "torch"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mergekit", type=Path)
    options = parser.parse_args()
    backend = choose_backend(options.backend).name
    streaming = TRAINERS[backend].replace("trainer", "streaming")
    idle = watch([sys.executable, "-c", f"import {streaming}, mlx_moe.hub.models, time; time.sleep(0.3)"])["private"]
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="transfers-") as name:
        scratch = Path(name)
        for model in options.models or [random_checkpoint(scratch / "random")]:
            config, out = open_model(model).config, scratch / "out"
            wider = ["--d-model", config.d_model * 3 // 2, "--n-layers", config.n_layers + 2]
            for command, arguments in (("upcycle", ["--experts", 8]), ("grow", wider)):
                rows = []
                for _ in range(options.rounds):
                    shutil.rmtree(out, ignore_errors=True)
                    rows.append(transfer([MLXMOE, command, model, out, *arguments, "--backend", backend]))
                    rows[-1] |= copied(out / checkpoint.MODEL, scratch / "copy")
                tensors = shapes(open_model(out).config)
                largest = 4 * max(int(np.prod(shape)) for shape in tensors.values())
                row = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
                row |= {"model": str(model), "command": command, "backend": backend, "largest_tensor": largest}
                row |= {"beyond": (max(row["private"] for row in rows) - idle) / largest}
                show(row)
                results.append(row)
                if options.mergekit and command == "upcycle":
                    results.append(compare_with_mergekit(model, out, scratch, options.mergekit))
    print(json.dumps(results))


def random_checkpoint(path: Path) -> Path:
    config = load_run("three-phase").model
    checkpoint.save(path, config, TrainerState(1, 0, "torch"), initialize(config, 0), None)
    return path


def transfer(command: list[Any]) -> dict[str, float]:
    found = watch(command)
    said = re.search(r"([\d.]+) GB in ([\d.]+) s, certified in ([\d.]+) s", found.pop("output"))
    assert said
    gigabytes, seconds, certified = map(float, said.groups())
    return found | {"gigabytes": gigabytes, "transfer": seconds, "certified": certified}


def copied(file: Path, copy: Path) -> dict[str, float]:
    subprocess.run(["sync"], check=True)
    began = time.perf_counter()
    subprocess.run(["cp", file, copy], check=True)
    cp = time.perf_counter() - began
    subprocess.run(["sync"], check=True)
    synced = time.perf_counter() - began - cp
    copy.unlink()
    return {"cp": cp, "sync": synced}


def watch(command: list[Any]) -> dict[str, Any]:
    """Return a command's seconds, peak resident set, peak anonymous part of it (bytes), and output."""
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        child = subprocess.Popen(list(map(str, command)), stdout=said, stderr=subprocess.STDOUT)
        resident = private = 0
        while child.poll() is None:
            status = Path(f"/proc/{child.pid}/status").read_text()
            sizes = {key: 1024 * int(size) for key, size in re.findall(r"(\w+):\s+(\d+) kB", status)}
            resident = max(resident, sizes.get("VmHWM", 0))
            private = max(private, sizes.get("RssAnon", 0) + sizes.get("RssShmem", 0))
            time.sleep(0.01)
        seconds = time.perf_counter() - began
        said.seek(0)
        output = said.read()
    if child.returncode:
        sys.exit(output)
    return {"all": seconds, "resident": resident, "private": private, "output": output}


def compare_with_mergekit(model: Path, ours: Path, scratch: Path, mergekit: Path) -> dict[str, Any]:
    import parity.libraries.transformers

    recipe, theirs, exported = scratch / "mergekit.yaml", scratch / "theirs", scratch / "exported"
    recipe.write_text(MERGEKIT.format(model.resolve()))
    flags = ["--i-understand-this-is-not-useful-without-training", "--device", "cpu"]
    found = watch([mergekit, recipe, theirs, *flags])
    del found["output"]
    subprocess.run([MLXMOE, "export", ours, exported, "--no-verify"], check=True, stdout=subprocess.DEVNULL)
    tokens_BT = checkpoint_probes(open_model(model), 4)[:, :-1]
    dense_BTV = parity.libraries.transformers.logits(model, tokens_BT)
    for name, folder in (("mlxmoe", exported), ("mergekit", theirs)):
        found[name] = float(np.abs(parity.libraries.transformers.logits(folder, tokens_BT) - dense_BTV).max())
    found |= {"bytes": sum(file.stat().st_size for file in theirs.glob("*.safetensors"))}
    print(
        f"mergekit-moe: {found['all']:.1f} s, {found['resident'] / 1e9:.2f} GB resident, "
        f"{found['private'] / 1e9:.2f} GB of it no file's, {found['bytes'] / 1e9:.2f} GB written; "
        f"max |Δlogit| in transformers {found['mergekit']:.1e}, of ours {found['mlxmoe']:.1e}"
    )
    return found | {"model": str(model), "command": "mergekit-moe"}


def show(row: dict[str, Any]) -> None:
    print(
        f"{Path(row['model']).name} {row['command']} ({row['backend']}), {row['gigabytes']:.2f} GB: "
        f"transfer {row['transfer']:.1f} s = {row['transfer'] / row['cp']:.2f} x cp = "
        f"{row['transfer'] / (row['cp'] + row['sync']):.2f} x (cp + sync), certified {row['certified']:.1f} s, "
        f"all {row['all']:.1f} s, "
        f"memory {row['resident'] / 1e9:.2f} GB ({row['beyond']:.2f}), cp {row['cp']:.2f} s, sync {row['sync']:.2f} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
