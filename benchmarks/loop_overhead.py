"""Overhead of the training loop over its steps: batches, rows, progress bar, and the rest of the loop.

    python benchmarks/loop_overhead.py --backend torch --steps 60

One phase of the demo's model on a real trainer, with a terminal's progress bar; evaluation and saving are not counted.
Shares are relative to the time of the steps in the same run. Prints a table and JSON.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import rich.live
from rich.console import Console as RichConsole

from mlx_moe.config import PhaseConfig
from mlx_moe.data.tokens import prepare
from mlx_moe.parameters import initialize
from mlx_moe.presets import load_run
from mlx_moe.storage.run_folder import RunFolder
from mlx_moe.training import loop
from mlx_moe.training.backend import Backend, choose_backend, peak_flops_per_s
from mlx_moe.training.console import Console
from mlx_moe.training.stopping import Interruption

seconds: defaultdict[str, float] = defaultdict(float)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="torch", choices=["mlx", "torch"])
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(choose_backend(options.backend), options.steps, Path(folder))
    steps = seconds.pop("steps")
    elsewhere = {"evaluation": seconds.pop("evaluation"), "checkpoints": seconds.pop("checkpoints")}
    total = seconds.pop("in all")
    # A thread draws the bar while a step is computed.
    seconds["the rest of the loop"] = total - steps - sum(elsewhere.values()) - seconds["batches"] - seconds["rows"]
    overhead = sum(seconds.values()) / steps
    for name, value in [("a step", steps), *seconds.items()]:
        print(f"{name:<24}{1e3 * value / options.steps:>10.3f} ms{100 * value / steps:>9.2f} %")
    print(f"{'overhead':<24}{1e3 * sum(seconds.values()) / options.steps:>10.3f} ms{100 * overhead:>9.2f} %")
    for name, value in elsewhere.items():
        print(f"{name:<24}{1e3 * value / options.steps:>10.3f} ms a step, not counted")
    parts = {name: round(100 * value / steps, 3) for name, value in seconds.items()}
    step_ms = round(1e3 * steps / options.steps, 2)
    print(json.dumps({"backend": options.backend, "step_ms": step_ms, "percent": parts, "overhead": overhead}))


def measure(backend: Backend, n_steps: int, folder: Path) -> None:
    run = load_run("demo", None, ["data.n_documents=2000"])
    data = prepare(run.data, cache=folder / "cache")
    model = run.model.model_copy(update={"vocab_size": data.tokenizer.vocab_size})
    trainer: Any = backend.trainer(model, initialize(model, run.seed), run.optimizer, "cpu")
    tokens = loop.batch(data.train, seed=1, phase=1, step=0, batch_size=16, context_length=model.context_length)
    for _ in range(2):  # one-time setup
        trainer.step(tokens, 1e-4, 0)()
    peak_flops_per_s(backend, trainer.precision.name, trainer.device)
    console = Console()
    console._rich = RichConsole(file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
    run_folder: Any = RunFolder(folder / "run")
    run_folder.path.mkdir()

    step = trainer.step
    trainer.step = lambda *arguments: timed("steps", timed("steps", step)(*arguments))
    run_folder.log_step = timed("rows", run_folder.log_step)
    rich.live.Live.refresh = timed("progress bar", rich.live.Live.refresh)  # type: ignore[method-assign]
    loop.batch = timed("batches", loop.batch)
    loop._save = timed("checkpoints", loop._save)
    loop.evaluate = timed("evaluation", loop.evaluate)
    phase = loop.Phase(1, PhaseConfig(steps=n_steps))
    train = timed("in all", loop.train_phase)
    train(run, phase, trainer, data, run_folder, 0, console, backend, Interruption())


def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*arguments: Any, **options: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            seconds[name] += time.perf_counter() - began

    return wrapper


if __name__ == "__main__":
    main()
