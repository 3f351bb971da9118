"""Kill a command with SIGKILL at random moments, restart it each time, and compare with an undisturbed run.

    python benchmarks/kill.py --backend torch --kills 50
    python benchmarks/kill.py --what import --kills 50

Every fifth moment is drawn uniformly over the length of a whole run, including start-up; the others over the work after
start-up: training, saving, boundaries; or reading, certifying, writing. A run that ends before its moment is checked,
and another begun. Exit code 0 means: all results equal those of the undisturbed run, to the last bit except times; at
no moment was a partial output visible; no process outlived the killed one; and nothing was left over. A `train` run is
resumed, each time from its latest undamaged checkpoint; of a sweep, the process that starts the runs is killed, and the
runs have to end by themselves. Prints a table and JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_moe.storage import checkpoint, jsonl
from mlx_moe.training.run import open_run

ROOT = Path(__file__).parents[1]
TIMING = {"tokens_per_s", "step_ms", "peak_memory_bytes", "mfu", "seconds"}
PATIENCE_SECONDS = 60  # for the runs of a killed sweep to end
# With a checkpoint after every step, saving takes a large share of the time.
RUN = [
    *("model.d_model=64", "model.n_layers=2", "model.n_heads=2", "model.context_length=16", "training.batch_size=4"),
    *("data.source=stories", "data.n_documents=60", "data.tokenizer=char", "data.validation_fraction=0.2"),
    *("phases.moe.n_experts=4", "phases.large_moe.d_model=96", "phases.large_moe.n_layers=3"),
    *("training.log_every=1", "training.eval_every=7", "training.eval_sequences=8", "training.checkpoint_every=1"),
]


LARGER = ["model.d_model=128", "model.n_layers=4", "phases.moe.n_experts=2"]  # makes writing slow enough to be hit
# Per command: whether it is restarted until it ends, and its arguments; the output's path comes last.
COMMANDS = {
    "sweep": (True, ["sweep", "sweep.yaml", "--jobs", "2", "--out"]),
    "import": (False, ["import", "model"]),
    "upcycle": (False, ["upcycle", "run/phases/1-dense", "--experts", "4"]),
    "grow": (False, ["grow", "run/phases/1-dense", "--d-model", "192"]),
    "export": (False, ["export", "run/phases/1-dense", "--no-verify"]),
    "report": (False, ["report", "run", "--out"]),
}
SWEEP = """\
name: s
preset: llama
n_phases: 2
overrides: {phases.dense.steps: 4, phases.moe.steps: 4, %s}
axes:
  seed: [0, 1, 2]
"""


@dataclass
class Result:
    what: str
    backend: str
    kills: Counter[str] = field(default_factory=Counter)  # by activity at the kill
    runs: int = 0
    seconds_of_a_run: float = 0
    steps_lost: list[int] = field(default_factory=list)  # per kill
    faults: list[str] = field(default_factory=list)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", default="train", choices=["train", *COMMANDS])
    parser.add_argument("--backend", default="torch", choices=["mlx", "torch"])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=60, help="of each phase of train")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.what == "train":
            result = kill(options.backend, options.kills, options.steps, options.seed, folder)
        else:
            result = Killing(options.what, options.backend, folder).kill(options.kills, options.seed)
    show(result)
    return 1 if result.faults else 0


def kill(backend: str, n_kills: int, n_steps: int, seed: int, folder: Path) -> Result:
    """Begin runs, kill and resume them until `n_kills` are done and the last run has ended."""
    result, began = Result("train", backend), time.perf_counter()
    begin = ["--preset", "demo", "--steps", str(n_steps), *(word for override in RUN for word in ("-o", override))]
    whole = folder / "left-alone"
    seconds_after_start = Attempt(folder, backend, whole, begin).wait()
    result.seconds_of_a_run = time.perf_counter() - began
    moments = random.Random(seed)
    while sum(result.kills.values()) < n_kills:
        run = folder / f"run-{result.runs}"
        ended = False
        while not ended:
            attempt = Attempt(folder, backend, run, begin)
            done = sum(result.kills.values())
            if done == n_kills:
                ended = attempt.ends_within(None)
            elif done % 5 == 4:
                ended = attempt.ends_within(moments.uniform(0, result.seconds_of_a_run))
            else:
                attempt.await_start()
                ended = attempt.ends_within(moments.uniform(0, attempt.share_left() * seconds_after_start))
            if not ended:
                result.kills[attempt.doing()] += 1
                result.steps_lost.append(attempt.steps_lost())
            result.faults += attempt.faults
            if attempt.faults:
                return result
        result.runs += 1
        result.faults += differences(run, whole)
    return result


class Attempt:
    """A process that begins or resumes a run."""

    def __init__(self, folder: Path, backend: str, run: Path, begin: list[str]):
        self.run = run
        self.began = (run / "config.yaml").exists()
        self.latest = checkpoint.latest(run)
        self.began_at = _modified(run / "environment.json")
        self.faults: list[str] = []
        self.said = folder / "said.txt"
        arguments = ["--resume", str(run)] if self.began else [*begin, "--out", str(run)]
        command = [sys.executable, "-m", "cli", "train", *arguments, "--backend", backend, "--device", "cpu"]
        with self.said.open("w") as said:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment(folder), stdout=said, stderr=said)

    def wait(self) -> float:
        """Wait for its end; return the seconds since its start."""
        self.await_start()
        began = time.perf_counter()
        if self.process.wait() != 0:
            raise SystemExit(f"the run that is left alone failed:\n{self.said.read_text()}")
        return time.perf_counter() - began

    def await_start(self) -> None:
        while self.is_starting() and self.process.poll() is None:
            time.sleep(0.002)

    def share_left(self) -> float:
        """Return the share of all phases' steps that remains."""
        if self.latest is None:
            return 1.0
        phase, step = _position(self.latest)
        return 1 - (phase - 1 + step / open_run(self.run).phases["dense"].steps) / 3

    def is_starting(self) -> bool:
        return _modified(self.run / "environment.json") == self.began_at

    def ends_within(self, seconds: float | None) -> bool:
        """Return whether it ended by itself; kill it otherwise."""
        try:
            exit_code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGKILL)
            exit_code = self.process.wait()
        text = self.said.read_text()
        if exit_code not in (0, -signal.SIGKILL) or "warning" in text:
            self.faults.append(f"exit code {exit_code} of {self.run.name}: {text[-500:]}")
        if self.latest and "resuming from" in text and f"from {self.latest.relative_to(self.run)}\n" not in text:
            self.faults.append(f"{self.run.name} was not resumed from {self.latest}: {text[-500:]}")
        return exit_code == 0

    def doing(self) -> str:
        """Describe what the process was doing when it was killed, by the files it left."""
        if any(self.run.glob("phases/*/checkpoints/.*")):
            return "saving a checkpoint"
        if _modified(self.run / "environment.json") == self.began_at:
            return "starting"
        latest = checkpoint.latest(self.run)
        if latest and latest.name == f"step-{self.steps_of_phase()}":
            return "between phases"
        return "training"

    def steps_of_phase(self) -> int:
        return open_run(self.run).phases["dense"].steps

    def steps_lost(self) -> int:
        rows, latest = jsonl.read(self.run / "metrics.jsonl"), checkpoint.latest(self.run)
        if not rows or latest is None:
            return len(rows)
        return sum((row["phase"], row["step"]) > _position(latest) for row in rows)


def differences(run: Path, whole: Path) -> list[str]:
    """List the differences between two finished runs, except times."""
    faults = []
    for name in ("metrics.jsonl", "history.jsonl"):
        if untimed(jsonl.read(run / name)) != untimed(jsonl.read(whole / name)):
            faults.append(f"{run.name}: {name} differs")
    moments = [(row["phase"], row["step"]) for row in jsonl.read(run / "metrics.jsonl")]
    if len(moments) != len(set(moments)):
        faults.append(f"{run.name}: a step is in metrics.jsonl twice")
    if (run / "samples.md").read_text() != (whole / "samples.md").read_text():
        faults.append(f"{run.name}: samples.md differs")
    one, other = checkpoint.load(run), checkpoint.load(whole)
    for arrays in ("weights", "optimizer_state"):
        for name, array in getattr(one, arrays).items():
            if array.tobytes() != getattr(other, arrays)[name].tobytes():
                faults.append(f"{run.name}: {name} of the {arrays} differs")
    if left := [*leftovers(run), *leftovers(run.parent)]:
        faults.append(f"{run.name}: left over: {left}")
    return faults


class Killing:
    """Kills of a command that writes one output into its own folder."""

    def __init__(self, what: str, backend: str, folder: Path):
        self.resumes, self.call = COMMANDS[what]
        if what in ("sweep", "upcycle", "grow"):
            self.call = [self.call[0], "--backend", backend, "--device", "cpu", *self.call[1:]]
        self.result = Result(what, backend)
        self.folder = folder
        self.mark = secrets.token_hex(8)  # in the environment of every process to be killed
        self.before: bytes | None = None  # an existing file's content, written by an earlier call
        self._make_materials(backend)

    def kill(self, n_kills: int, seed: int) -> Result:
        """Kill until `n_kills` are reached, and the last run has ended."""
        moments, whole = random.Random(seed), self.folder / "left-alone" / "out"
        seconds_of_work = self._leave_alone(whole)
        while sum(self.result.kills.values()) < n_kills and not self.result.faults:
            place = self.folder / f"run-{self.result.runs}" / "out"
            self._prepare(place)
            ended = False
            while not ended and not self.result.faults:
                done = sum(self.result.kills.values())
                attempt = self._start(place)
                if done == n_kills or (done and not self.resumes and self.result.runs < done):
                    ended = self._ends_within(attempt, place, None)
                elif done % 5 == 4:
                    ended = self._ends_within(attempt, place, moments.uniform(0, self.result.seconds_of_a_run))
                else:
                    self._await_work(attempt, place)
                    ended = self._ends_within(attempt, place, moments.uniform(0, 1.1 * seconds_of_work))
                if not ended:
                    self._note_a_kill(place, whole)
            self.result.runs += 1
            self.result.faults += self._differences(place, whole)
            shutil.rmtree(place.parent)
        return self.result

    def _make_materials(self, backend: str) -> None:
        overrides = [override for override in RUN if not override.startswith("phases")] + LARGER
        train = ["train", "--preset", "llama", "--phases", "2", "--steps", "2", "--backend", backend, "--device", "cpu"]
        self._run([*train, *(word for override in overrides for word in ("-o", override)), "--out", "run"])
        self._run(["export", "run/phases/1-dense", "--no-verify", "model"])
        values = ", ".join(override.replace("=", ": ") for override in RUN)
        (self.folder / "sweep.yaml").write_text(SWEEP % values)

    def _leave_alone(self, whole: Path) -> float:
        """Run the command undisturbed; return seconds from its first sign to its output (its end, if resumable)."""
        self._prepare(whole)
        began = time.perf_counter()
        attempt = self._start(whole)
        self._await_work(attempt, whole)
        start = time.perf_counter()
        while not self.resumes and not self._is_there(whole) and attempt.poll() is None:
            time.sleep(0.001)
        appeared = time.perf_counter()
        if not self._ends_within(attempt, whole, None) or self.result.faults:
            raise SystemExit(f"the command that is left alone failed: {self.result.faults}")
        self.result.seconds_of_a_run = time.perf_counter() - began
        return (time.perf_counter() if self.resumes else appeared) - start

    def _prepare(self, place: Path) -> None:
        place.parent.mkdir(parents=True)
        if self.result.what == "report" and self.result.runs % 2:
            self.before = b"<!-- written by mlxmoe report --> of an earlier run"
            place.write_bytes(self.before)
        else:
            self.before = None

    def _start(self, place: Path) -> subprocess.Popen[bytes]:
        with (self.folder / "said.txt").open("w") as said:
            return subprocess.Popen(
                [sys.executable, "-m", "cli", *self.call, str(place)],
                cwd=self.folder,
                env=environment(self.folder) | {"MLXMOE_KILLED": self.mark},
                stdout=said,
                stderr=said,
            )

    def _await_work(self, attempt: subprocess.Popen[bytes], place: Path) -> None:
        """Wait for a new entry beside the output's path, or in it."""
        there = set(os.listdir(place.parent)), _modified(place)
        while there == (set(os.listdir(place.parent)), _modified(place)) and attempt.poll() is None:
            time.sleep(0.001)

    def _ends_within(self, attempt: subprocess.Popen[bytes], place: Path, seconds: float | None) -> bool:
        was_there = self._is_there(place)
        try:
            exit_code = attempt.wait(seconds)
        except subprocess.TimeoutExpired:
            attempt.send_signal(signal.SIGKILL)
            exit_code = attempt.wait()
        text = (self.folder / "said.txt").read_text()
        # an output that appeared just before the kill must not be overwritten
        refused = exit_code == 2 and was_there and "exists already" in text.splitlines()[-1]
        if exit_code not in (0, -signal.SIGKILL) and not refused:
            self.result.faults.append(f"exit code {exit_code}: {text[-500:]}")
        return exit_code != -signal.SIGKILL

    def _is_there(self, place: Path) -> bool:
        return place.exists() and (not place.is_file() or place.read_bytes() != self.before)

    def _note_a_kill(self, place: Path, whole: Path) -> None:
        """Record what it was doing, whether it left a partial output, and whether all of its processes end."""
        started = leftovers(place.parent) or (self.resumes and place.exists())
        doing = "its work" if started else "done" if self._is_there(place) else "starting"
        self.result.kills[doing] += 1
        if not self.resumes and self._is_there(place):
            self.result.faults += [fault for fault in self._differences(place, whole) if "left over" not in fault]
        elif not self.resumes and self.before is not None and not place.exists():
            self.result.faults.append(f"{place}: what was there is gone")
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (alive := list(marked(self.mark))) and time.monotonic() < deadline:
            time.sleep(0.05)
        for number in alive:
            self.result.faults.append(f"process {number} outlived the one that was killed")
            os.kill(number, signal.SIGKILL)

    def _differences(self, place: Path, whole: Path) -> list[str]:
        found = [f"left over: {name}" for name in leftovers(place.parent)]
        if self.result.what == "sweep":
            runs = sorted(path.parent.name for path in whole.glob("*/config.yaml"))
            found += [fault for run in runs for fault in differences(place / run, whole / run)]
            rows = [
                [
                    {key: row.get(key) for key in ("run", "status", "tokens", "validation_loss")}
                    for row in jsonl.read(file)
                ]
                for file in (place / "results.jsonl", whole / "results.jsonl")
            ]
            return found if rows[0] == rows[1] else [*found, "results.jsonl differs"]
        files = [contents(folder) for folder in (place, whole)]
        names = sorted(name for name in files[0].keys() | files[1].keys() if files[0].get(name) != files[1].get(name))
        return found + [f"{place.name}/{name} differs" for name in names]

    def _run(self, argv: list[str]) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "cli", *argv],
            cwd=self.folder,
            env=environment(self.folder),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"mlxmoe {' '.join(argv)}: {done.stderr}")


def contents(place: Path) -> dict[str, bytes]:
    """Return the bytes of a file, or of all files of a folder."""
    files = place.rglob("*") if place.is_dir() else [place]
    return {str(file.relative_to(place)): file.read_bytes() for file in files if file.is_file()}


def leftovers(folder: Path) -> list[str]:
    """List scratch folders and lock files."""
    return [str(path) for path in folder.rglob(".mlxmoe-*")]


def marked(mark: str) -> Iterator[int]:
    """Yield the living processes with a mark in their environment."""
    if Path("/proc/self/environ").exists():
        for file in Path("/proc").glob("[0-9]*/environ"):
            try:
                if mark.encode() in file.read_bytes():
                    yield int(file.parent.name)
            except OSError:  # it has just ended, or belongs to another user
                continue
        return
    listed = subprocess.run(["ps", "axeww", "-o", "pid=,command="], capture_output=True, text=True, check=True)
    yield from (int(line.split()[0]) for line in listed.stdout.splitlines() if mark in line)


def environment(folder: Path) -> dict[str, str]:
    """Return a command's environment: its own token cache, one thread."""
    own = {"MLXMOE_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    return os.environ | own | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def untimed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in TIMING} for row in rows]


def show(result: Result) -> None:
    for name, count in result.kills.most_common():
        print(f"{name:<24}{count:>4} kills")
    print(f"{'runs brought to an end':<24}{result.runs:>4}, {result.seconds_of_a_run:.1f} s each when left alone")
    if result.steps_lost:
        print(f"{'steps done again':<24}{max(result.steps_lost):>4} at most after a kill")
    print(f"{'faults':<24}{len(result.faults):>4}")
    for fault in result.faults:
        print(f"  {fault}")
    values = vars(result) | {"kills": dict(result.kills), "steps_lost": max(result.steps_lost, default=0)}
    print(json.dumps(values | {"seconds_of_a_run": round(result.seconds_of_a_run, 1)}))


def _position(saved: Path) -> tuple[int, int]:
    """Return phase and step of a checkpoint's folder."""
    return int(saved.parts[-3][0]), int(saved.name.removeprefix("step-"))


def _modified(path: Path) -> float | None:
    return path.stat().st_mtime if path.exists() else None


if __name__ == "__main__":
    sys.exit(main())
