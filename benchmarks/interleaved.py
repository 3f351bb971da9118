"""Interleaved timing of functions, so that other load on the machine affects all of them alike."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any


def medians(functions: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = 2) -> dict[str, float]:
    """Return the median seconds of each function over `rounds`; functions must wait for their own results."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for a_round in range(-warm_up, rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if a_round >= 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def show(seconds: Mapping[str, float], over: str, **about: Any) -> None:
    """Print a table of milliseconds and of ratios to the function named `over`; then a line of JSON."""
    width = max(map(len, seconds))
    for name, one in seconds.items():
        print(f"{name:{width}}  {one * 1e3:10.1f} ms  {one / seconds[over]:6.3f}")
    print(json.dumps({**about, "over": over, "seconds": dict(seconds)}))


class Child:
    """A process that runs a function of this script on each call.

    Libraries in one process share threads and symbols; in separate processes they do not. The script calls `serve` with
    the function. Construction returns when it is loaded, so that the next one loads on an idle machine, which PyTorch's
    thread settings depend on.
    """

    def __init__(self, *arguments: str, environment: Mapping[str, str] | None = None):
        command = [sys.executable, sys.argv[0], *arguments]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **(environment or {})}
        )
        self._wait()

    def __call__(self) -> None:
        assert self._process.stdin
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        self._wait()

    def _wait(self) -> None:
        assert self._process.stdout
        if not self._process.stdout.readline():
            raise RuntimeError(f"{self._process.args} ended with {self._process.wait()}")


def serve(function: Callable[[], Any]) -> None:
    """Announce that the function is ready; then run it for every line of input, and answer each with a line."""
    print("ready", flush=True)
    for _ in sys.stdin:
        function()
        print("done", flush=True)
