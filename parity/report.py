"""Compare what was asked for, print what came out, and keep it as JSON and as a page."""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mlx_moe.errors import InputError
from mlx_moe.storage.atomic import output_file, signature, writing
from mlx_moe.storage.environment import library_versions
from mlx_moe.terminal import echo
from parity import self_test
from parity.any_model import compare_model
from parity.compare import compare_architectures, compare_checkpoints
from parity.comparison_report import comparisons_json, self_test_json, show_comparisons, show_self_test
from parity.model_report import model_json, show_model
from parity.page import page

Json = dict[str, Any]


@dataclass(frozen=True)
class Request:
    """What to compare: a model of any library's, a checkpoint, or small fresh models; with known faults put in, too."""

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


def report(request: Request, as_json: bool, out: Path | None, html: Path | None) -> int:
    """Returns 0 if all is the same, 1 if something differs, 2 if there was nothing to judge.

    Raises InputError where that is known at once.
    """
    if request.model and (request.checkpoint or request.presets):
        raise InputError(
            "--model compares mlx-lm with transformers, by itself; leave the checkpoint and --preset out, or --model"
        )
    places = [(out, "parity.json"), (html, "parity.html")]
    if out and html and _overlap(*(output_file(place, name) for place, name in places if place)):
        raise InputError(f"--out {out} and --html {html} need two files side by side; name others")
    with ExitStack() as held:
        files = [held.enter_context(writing(place, name, "parity")) if place else None for place, name in places]
        return _report(request, as_json, *files)


def _overlap(one: Path, other: Path) -> bool:
    one, other = (Path(os.path.realpath(path)) for path in (one, other))
    return one == other or one in other.parents or other in one.parents


def _report(request: Request, as_json: bool, out: Path | None, html: Path | None) -> int:
    document: Json = {
        "generator": signature("parity"),
        "command": request.command,
        "seed": request.seed,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": library_versions(),
    }
    codes, shows = [], list[Callable[[], None]]()
    if request.model:
        found = compare_model(request.model, request.seed)
        document["model"] = model_json(found)
        codes.append(found.exit_code)
        shows.append(partial(show_model, found))
    else:
        checkpoint, presets = request.checkpoint, request.presets
        compared = (
            compare_checkpoints(checkpoint, request.seed)
            if checkpoint
            else compare_architectures(presets, request.seed)
        )
        results = list(compared)
        document |= comparisons_json(results)
        codes.append(int(not all(result.passed for result in results)))
        shows.append(partial(show_comparisons, results))
    if request.self_test:
        outcomes, thresholds = self_test.run(request.seed)
        document |= self_test_json(outcomes, thresholds)
        codes.append(int(not all(outcome.caught for outcome in outcomes)))
        shows.append(partial(show_self_test, outcomes, thresholds))
    document["passed"] = None if 2 in codes else not any(codes)
    text = json.dumps(_finite(document), indent=2)
    if out:
        out.write_text(text, encoding="utf-8")
    if html:
        html.write_text(page(json.loads(text)), encoding="utf-8")
    if as_json:
        echo(text)
    else:
        for show in shows:
            show()
    return max(codes)


def _finite(value: Any) -> Any:
    """Null stands for what is not finite, which JSON cannot hold."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
