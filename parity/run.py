"""Run a comparison, print its report, and write it as JSON and as a page."""

from __future__ import annotations

import os
import shlex
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from mlx_moe.errors import InputError
from mlx_moe.storage.atomic import output_file, writing
from mlx_moe.terminal import echo
from parity import self_test, terminal
from parity.compare import compare_architectures, compare_checkpoints
from parity.library_parity import compare_model
from parity.page import render
from parity.report import ParityReport


@dataclass(frozen=True)
class ParityRequest:
    """Subject of a comparison: a checkpoint, a model folder for the libraries, or small fresh models of presets."""

    checkpoint: Path | None = None
    model: Path | None = None
    presets: tuple[str, ...] = ()
    seed: int = 0
    self_test: bool = False

    @property
    def command(self) -> str:
        words = [str(self.checkpoint)] if self.checkpoint else []
        words += ["--model", str(self.model)] if self.model else []
        words += [word for name in self.presets for word in ("--preset", name)]
        words += ["--seed", str(self.seed), *(["--self-test"] if self.self_test else [])]
        return shlex.join(["mlxmoe", "parity", *words])


def run_and_write(request: ParityRequest, as_json: bool, out: Path | None, html: Path | None) -> int:
    """Run the comparison, print it, and write JSON to `out` and a page to `html`. Return the exit code.

    Raises InputError at once where the request contradicts itself or a file cannot be written.
    """
    if request.model and (request.checkpoint or request.presets):
        raise InputError(
            "--model compares mlx-lm with transformers, by itself; leave the checkpoint and --preset out, or --model"
        )
    places = [(out, "parity.json"), (html, "parity.html")]
    if out and html and _overlap(*(output_file(place, name) for place, name in places if place)):
        raise InputError(f"--out {out} and --html {html} need two files side by side; name others")
    with ExitStack() as held:
        json_file, page_file = (
            held.enter_context(writing(place, name, "parity")) if place else None for place, name in places
        )
        report = run(request)
        if json_file:
            json_file.write_text(report.to_json(), encoding="utf-8")
        if page_file:
            # A path may hold bytes that are not UTF-8.
            page_file.write_text(render(report), encoding="utf-8", errors="backslashreplace")
        if as_json:
            echo(report.to_json())
        else:
            terminal.show(report)
    return report.exit_code


def run(request: ParityRequest) -> ParityReport:
    """Return the report of the comparison."""
    checkpoint, presets, seed = request.checkpoint, request.presets, request.seed
    tested = self_test.run if request.self_test else lambda seed: None
    if request.model:
        return ParityReport(request.command, seed, library=compare_model(request.model, seed), self_test=tested(seed))
    compared = compare_checkpoints(checkpoint, seed) if checkpoint else compare_architectures(presets, seed)
    return ParityReport(request.command, seed, comparisons=tuple(compared), self_test=tested(seed))


def _overlap(left: Path, right: Path) -> bool:
    left, right = (Path(os.path.realpath(path)) for path in (left, right))
    return left == right or left in right.parents or right in left.parents
