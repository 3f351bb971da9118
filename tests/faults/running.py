"""Runs a command in this process, and says how it ended and whether anything was left to chance."""

from __future__ import annotations

import contextlib
import io
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

import cli

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "COLUMNS": "200", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Outcome:
    """`crash`: the traceback of what nobody expected, and only the last resort in `cli.main` turned into a line."""

    code: int
    out: str
    err: str
    crash: str | None = None

    @property
    def refusal(self) -> str | None:
        """What is wrong with the way in which the command said no, if anything; None too where it did not say no."""
        if self.crash:
            return f"a crash: {self.crash}"
        lines = self.err.splitlines()
        if self.code == 2 and (len(lines) != 1 or not self.err.startswith("error: ")):
            return f"not one line: {self.err}"
        return None


def run_here(argv: Sequence[str], folder: Path, environment: Mapping[str, str]) -> Outcome:
    """Run `mlxmoe ARGV` in a folder."""
    out, err, crashes = io.StringIO(), io.StringIO(), list[str]()

    def describe_crash(error: BaseException) -> tuple[str, int]:
        crashes.append("".join(traceback.format_exception(error)))
        return "a crash", 70

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.chdir(folder)
        for name, value in {**ENVIRONMENT, **environment}.items():
            patch.setenv(name, value)
        patch.setattr(tempfile, "tempdir", None)  # so that TMPDIR is asked anew
        patch.setattr("sys.argv", ["mlxmoe", *argv])
        patch.setattr(cli, "describe_crash", describe_crash)
        try:
            cli.main()
            code = 0
        except SystemExit as stopped:
            code = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
    return Outcome(code, out.getvalue(), err.getvalue(), crashes[0] if crashes else None)
