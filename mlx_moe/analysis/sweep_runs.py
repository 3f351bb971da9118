"""Execution of a sweep: every run in its own process, one after another or several at once.

The sweep's folder holds `sweep.json` (the planned runs), a folder and a log per run, and the results so far:
`results.jsonl`, `results.csv` and `summary.json`. Finished runs are not repeated, interrupted ones are resumed, and
failed ones are kept and reported.

Two locks: the folder's excludes other sweeps. The runs inherit that of `logs`, which is free only once all of them have
ended. They end with the sweep, however it ends: each waits on a pipe that the sweep holds open, and saves and stops
when it closes.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from mlx_moe.analysis import sweep_worker
from mlx_moe.analysis.run_reader import read_run_config
from mlx_moe.analysis.sweep_results import (
    ELSEWHERE,
    FAILED,
    FAILURE,
    FINISHED,
    INTERRUPTED,
    gather,
    row_of,
    show,
    write,
)
from mlx_moe.analysis.sweep_worker import HELD_ELSEWHERE, SWEEP, is_held, read_sweep
from mlx_moe.analysis.sweeps import PlannedRun
from mlx_moe.data.sources import open_source
from mlx_moe.errors import InputError, one_line, quoted
from mlx_moe.storage import locks
from mlx_moe.storage.atomic import (
    SCRATCH,
    SYSTEM_FILES,
    absolute,
    clean_leftovers,
    culprit,
    make_folder,
    quarantine,
    replacing,
)
from mlx_moe.storage.identity import read_identity
from mlx_moe.storage.run_folder import CONFIG, check_new
from mlx_moe.training.backend import LAUNCHERS, choose_backend
from mlx_moe.training.console import Console
from mlx_moe.training.stopping import TrainingStopped, interruptions
from mlx_moe.validation import by_path

LOGS = "logs"
POLL_SECONDS = 0.1
PATIENCE_SECONDS = 30  # wait for the runs of a killed sweep, which save once they notice
LOG_TAIL = 64 << 10  # bytes searched for the last line
LONGEST_REASON = 500  # characters
# External causes, not faults of the run: systems that run out of memory also send SIGKILL.
INTERRUPTING = {signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
# Variables that would change a run's exit code or colour its log.
NOT_INHERITED = {"PYTHONINSPECT", "PYTHONWARNINGS", "PYTHONIOENCODING", "FORCE_COLOR", "TTY_COMPATIBLE"}


@dataclass(frozen=True)
class SweepOptions:
    """Options of this call that are not part of the sweep.

    `retry`: restart failed runs. `command`: the user's command to resume the sweep.
    """

    backend: str = "auto"
    device: str = "auto"
    jobs: int = 1
    retry: bool = False
    command: str = "mlxmoe sweep"


def run_sweep(planned: Sequence[PlannedRun], out: Path, options: SweepOptions) -> list[dict[str, Any]]:
    """Train unfinished runs, and write the results after each; return their rows.

    Raises TrainingStopped on a signal, once the active runs have saved; InputError if the folder holds other runs, if
    another process is sweeping in it, or if it cannot be written.
    """
    choose_backend(options.backend)  # fail here rather than in every log
    for variable, (launcher, _) in LAUNCHERS.items():
        if variable in os.environ:  # every run would inherit it, and wait for the other processes
            raise InputError(f"{launcher} starts several processes of one run; start a sweep without it")
    out, console = absolute(out), Console()
    for data in {run.config.data for run in planned if row_of(run, out / run.name)["status"] != FINISHED}:
        open_source(data)  # report missing data here rather than in every log
    with _reported(out), _sole(planned, out, console) as lock:
        return _Sweep(planned, out, options, console, lock).run()


@dataclass(frozen=True)
class _Started:
    run: PlannedRun
    process: subprocess.Popen[bytes]
    since: float
    log_bytes: int  # written by earlier attempts


@dataclass
class _Sweep:
    planned: Sequence[PlannedRun]
    out: Path
    options: SweepOptions
    console: Console
    lock: int  # inherited by the runs
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)  # by the run's name
    running: list[_Started] = field(default_factory=list)
    is_stopping: bool = False

    def run(self) -> list[dict[str, Any]]:
        """Start runs up to the limit, until none is left or a signal arrives."""
        if self.options.retry:
            self._set_failures_aside()
        self.rows = {row["run"]: row for row in gather(self.planned, self.out)}
        waiting = [run for run in self.planned if not self._is_settled(run)]
        with interruptions() as interruption, self._asking_at_the_end() as (pipe, ask):
            while self.running or (waiting and interruption.received is None):
                while waiting and len(self.running) < self.options.jobs and interruption.received is None:
                    self._start(waiting.pop(0), pipe)
                if interruption.received is not None:
                    ask()
                for started in [started for started in self.running if started.process.poll() is not None]:
                    self.running.remove(started)
                    self._finish(started)
                time.sleep(POLL_SECONDS)
        self._look_again()
        if interruption.received is not None:
            name = signal.Signals(interruption.received).name
            raise TrainingStopped(f"{name}: stopped; resume with: {self.options.command}", 128 + interruption.received)
        rows = self._all_rows()
        show(rows, self.out, self.console)
        return rows

    def _set_failures_aside(self) -> None:
        """Rename the folders of failed runs, so that they restart, unless another process trains in them."""
        for run in self.planned:
            folder = self.out / run.name
            if row_of(run, folder)["status"] != FAILED:
                continue
            try:
                descriptor = locks.acquire(folder)
            except locks.Busy:
                self.console.warn(f"{run.name} was left where it is: another process trains in it")
                continue
            try:
                aside = quarantine(folder, "failed")
            finally:
                os.close(descriptor)
            self.console.line(f"{run.name} is now {aside.name}")

    def _is_settled(self, run: PlannedRun) -> bool:
        """Print the status of a run that this sweep does not start, and return whether it is such a run."""
        row, folder = self.rows[run.name], self.out / run.name
        clean_leftovers(folder)
        if row["status"] != FINISHED and is_held(folder):
            row |= {"status": ELSEWHERE, "reason": None}
        if row["status"] not in (FINISHED, FAILED, ELSEWHERE):
            return False
        self._say(run, "")
        return True

    @contextmanager
    def _asking_at_the_end(self) -> Iterator[tuple[int, Any]]:
        """Yield the end of the pipe that runs inherit, and a function that asks them, once, to save and stop.

        In any case, none of them is running when this returns.
        """
        reading, writing = os.pipe()

        def ask() -> None:
            if self.is_stopping:
                return
            self.is_stopping = True
            os.close(writing)
            if n := len(self.running):
                self.console.line(f"waiting for {n} run{'s' if n > 1 else ''} to save; another Ctrl-C ends at once")

        try:
            yield reading, ask
        except Exception:
            ask()
            raise
        except BaseException:  # a second signal: end without saving
            for started in self.running:
                started.process.kill()
            raise
        finally:
            os.close(reading)
            if not self.is_stopping:
                os.close(writing)
            for started in self.running:
                started.process.wait()

    def _start(self, run: PlannedRun, pipe: int) -> None:
        """Start a run in its own session: Ctrl-C reaches only this process, which then asks the run to save."""
        environment = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
        environment |= {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "PYTHONUNBUFFERED": "1"}
        environment |= {"COLUMNS": "120"}
        if (n_threads := self._threads(run)) is not None:
            environment = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(n_threads)) | environment
        # -P: modules in the working folder must not shadow Python's.
        command = [sys.executable, "-P", "-m", sweep_worker.__name__, str(self.out), run.name]
        command += [self.options.backend, self.options.device, str(pipe), str(self.lock)]
        with self._log(run) as stream:
            try:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=stream,
                    env=environment,
                    start_new_session=True,
                    pass_fds=(pipe, self.lock),
                )
            except OSError as error:
                raise InputError(
                    f"cannot start run {run.name}: {error.strerror or one_line(error)}; with fewer --jobs, or later, "
                    f"resume with: {self.options.command}"
                ) from None
            self.running.append(_Started(run, process, time.monotonic(), stream.tell()))

    def _threads(self, run: PlannedRun) -> int | None:
        """Return the run's original number of threads; a new run gets its share of the cores."""
        with suppress(InputError):  # reported by the run's own process
            if (identity := read_identity(self.out / run.name)) is not None:
                return identity.threads
        return max(1, (os.cpu_count() or 1) // self.options.jobs) if self.options.jobs > 1 else None

    def _finish(self, started: _Started) -> None:
        """Record a run's result, and why it failed if it did."""
        run, code = started.run, started.process.returncode
        folder = self.out / run.name
        row = row_of(run, folder)
        if row["status"] != FINISHED and code != 0:
            reason = f"killed by {signal.Signals(-code).name}" if code < 0 else self._last_line(started)
            if code == HELD_ELSEWHERE or is_held(folder):
                row |= {"status": ELSEWHERE, "reason": None}
            elif code > 128 or -code in INTERRUPTING:
                row |= {"status": INTERRUPTED, "reason": None if self.is_stopping else reason}
            elif code == 2 and (folder / CONFIG).is_file():  # fixable by the user, such as a full disk
                row |= {"status": INTERRUPTED, "reason": reason}
            else:
                make_folder(folder)
                with replacing(folder / FAILURE) as partial:
                    values = {"reason": reason, "exit_code": code}
                    partial.write_text(json.dumps(values) + "\n", encoding="utf-8")
                row = row_of(run, folder)
        self.rows[run.name] = row
        write(self._all_rows(), self.out)
        self._say(run, f" in {time.monotonic() - started.since:.0f} s")

    def _look_again(self) -> None:
        """Update the rows of runs that another process was training."""
        for run in self.planned:
            row, folder = self.rows[run.name], self.out / run.name
            if row["status"] == ELSEWHERE and not is_held(folder):
                self.rows[run.name] = row_of(run, folder)
        write(self._all_rows(), self.out)

    def _all_rows(self) -> list[dict[str, Any]]:
        return [self.rows[run.name] for run in self.planned]

    def _say(self, run: PlannedRun, time_taken: str) -> None:
        row, number = self.rows[run.name], list(self.rows).index(run.name) + 1
        if row["status"] == FINISHED:
            verdict = f"validation loss {row['validation_loss']:.4f}"
        else:
            verdict = f"{row['status']}: {row['reason']}" if row["reason"] else row["status"]
        self.console.line(f"[{number}/{len(self.planned)}] {run.name}: {verdict}{time_taken}")

    def _log(self, run: PlannedRun) -> BinaryIO:
        """Open a run's log for appending. Raises InputError if it is not a regular file."""
        file = self.out / LOGS / f"{run.name}.txt"
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(file, flags, 0o666)
        stream = os.fdopen(descriptor, "ab")
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            stream.close()
            raise InputError(f"cannot write {file}: it is no regular file; move it away")
        return stream

    def _last_line(self, started: _Started) -> str:
        """Return the last line that a run printed, which explains why it stopped."""
        with suppress(OSError), (self.out / LOGS / f"{started.run.name}.txt").open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(started.log_bytes, size - LOG_TAIL))
            lines = stream.read().decode("utf-8", errors="replace").split("\n")
            if said := [line.strip() for line in lines if line.strip()]:
                return said[-1][:LONGEST_REASON]
        return "nothing in its log"


@contextmanager
def _sole(planned: Sequence[PlannedRun], out: Path, console: Console) -> Iterator[int]:
    """Exclude other sweeps from a folder, and write the planned runs; yield the lock that the runs inherit."""
    _check_folder(planned, out)  # before anything is written
    make_folder(out)
    try:
        own = locks.acquire(out)
    except locks.Busy:
        raise InputError(f"another process is sweeping in {out}; wait for it, or name another --out") from None
    try:
        before = _check_folder(planned, out)
        for run in planned:
            _check_run(run, out / run.name)
        make_folder(out / LOGS)
        inherited = _wait_for_runs(out, console)
        try:
            clean_leftovers(out)
            with replacing(out / SWEEP) as partial:
                runs = before | {run.name: run.to_json() for run in planned}
                partial.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
            yield inherited
        finally:
            os.close(inherited)
    finally:
        os.close(own)


def _check_folder(planned: Sequence[PlannedRun], out: Path) -> dict[str, Any]:
    """Return the contents of the folder's `sweep.json`. Raises InputError if the folder is something else."""
    if os.path.lexists(out) and not out.is_dir():
        raise InputError(f"--out {out} is no folder; name another one")
    for place in (LOGS, *(run.name for run in planned)):
        if os.path.lexists(out / place) and not (out / place).is_dir():
            raise InputError(f"{out / place} is no folder, as a run's must be; move it away")
    if not (out / SWEEP).is_file():
        if out.is_dir() and not all(map(_is_of_a_beginning, out.iterdir())):
            raise InputError(f"{out} is not empty and holds no sweep; name another --out")
        return {}
    before = {name: run.model_dump() for name, run in read_sweep(out).items()}
    if not before:
        raise InputError(f"{out} holds no sweep: {SWEEP} in it names no run; name another --out")
    changed = [run.name for run in planned if run.name in before and before[run.name] != run.to_json()]
    if changed:
        raise InputError(
            f"{out} holds another sweep: {changed[0]} ({len(changed)} such) has another config; name another --out"
        )
    return before


def _check_run(run: PlannedRun, folder: Path) -> None:
    """Raise InputError if a run's folder holds something else: another run, or a user's files."""
    if (folder / CONFIG).is_file():
        try:
            there = by_path(read_run_config(folder).model_dump(mode="json"))
        except InputError:
            return  # reported by its own process and row
        planned = by_path(run.config.model_dump(mode="json"))
        settled = {"name", "model.vocab_size"}  # set by the user; by the tokenizer
        # paths in a run are absolute, and its data is identified by hashes
        settled |= {key for key in ("data.source", "data.tokenizer") if os.path.isabs(there[key])}
        for key in dict.fromkeys([*planned, *there]):
            if key not in settled and there.get(key) != planned.get(key):
                raise InputError(
                    f"{folder} holds another run than the sweep's: its {key} is {quoted(there.get(key))}, and the "
                    f"sweep's {quoted(planned.get(key))}; move it away, or name another --out"
                )
    elif not (folder / FAILURE).is_file() and folder.is_dir():
        try:
            check_new(folder)
        except InputError:
            raise InputError(
                f"{folder} is not empty, and no run of the sweep; move it away, or name another --out"
            ) from None


def _is_of_a_beginning(entry: Path) -> bool:
    """Return whether an entry may be left from a sweep killed before it wrote `sweep.json`."""
    if entry.name == LOGS and entry.is_dir():
        return not any(entry.iterdir())
    return entry.name in SYSTEM_FILES or entry.name.startswith(SCRATCH)


def _wait_for_runs(out: Path, console: Console) -> int:
    """Lock the folder of the logs, once the runs of a killed sweep have saved; return the descriptor."""
    until, is_told = time.monotonic() + PATIENCE_SECONDS, False
    while True:
        try:
            return locks.acquire(out / LOGS)
        except locks.Busy:
            if time.monotonic() > until:
                raise InputError(
                    f"runs of a sweep that was killed are still saving in {out}; try again once they have ended"
                ) from None
            if not is_told:
                console.line("waiting for runs of a sweep that was killed to save")
            is_told = True
            time.sleep(POLL_SECONDS)


@contextmanager
def _reported(out: Path) -> Iterator[None]:
    """Convert errors of the file system to one line."""
    try:
        yield
    except OSError as error:
        about = culprit(error, out)
        raise InputError(
            f"cannot use {about}: {error.strerror or one_line(error)}; fix that, then run the same command again"
        ) from None
