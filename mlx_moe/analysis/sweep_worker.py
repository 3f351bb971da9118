"""Process of one run of a sweep: python -m mlx_moe.analysis.sweep_worker FOLDER NAME BACKEND DEVICE [FDS].

FDS are two descriptors inherited from the sweep: the end of a pipe, which closes when the sweep asks the run to stop or
dies, and the lock that shows the next sweep that this process is still alive.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

from mlx_moe.config import RunConfig
from mlx_moe.errors import InputError
from mlx_moe.storage import locks
from mlx_moe.storage.identity import IDENTITY
from mlx_moe.storage.reading import read_json
from mlx_moe.storage.records import SweepRun
from mlx_moe.storage.run_folder import CONFIG, check_new
from mlx_moe.terminal import describe_crash, prepare_streams
from mlx_moe.training.backend import choose_backend
from mlx_moe.training.console import Console
from mlx_moe.training.request import Options
from mlx_moe.training.resume import resume_run
from mlx_moe.training.run import open_run, train_phases
from mlx_moe.training.stopping import TrainingStopped
from mlx_moe.validation import validate

SWEEP = "sweep.json"
LARGEST_SWEEP = 256 << 20  # bytes of sweep.json
HELD_ELSEWHERE = os.EX_TEMPFAIL  # exit code if another process trains in the run's folder


def read_sweep(folder: Path) -> dict[str, SweepRun]:
    """Read the runs of a sweep's folder. Raises InputError if `sweep.json` is missing or damaged."""
    file = folder / SWEEP
    values = read_json(file, LARGEST_SWEEP)
    try:
        return validate(dict[str, SweepRun], values)
    except InputError as error:
        raise InputError(f"cannot read {file}: {error.lines[0]}") from None


def is_held(folder: Path) -> bool:
    """Return whether another process trains in a run's folder."""
    try:
        os.close(locks.acquire(folder, shared=True))
    except locks.Busy:
        return True
    except OSError:  # the folder does not exist yet
        return False
    return False


def train_one(out: Path, name: str, backend: str, device: str) -> int:
    """Train or resume one run of a sweep; return its exit code. An error is the last line that it prints."""
    folder = out / name
    try:
        spec = read_sweep(out)[name]
        if (folder / CONFIG).is_file() and not (folder / IDENTITY).is_file():  # else use the sweep's settings
            run, chosen, options = open_run(folder), choose_backend(backend), Options(device)
        elif (folder / CONFIG).is_file():
            found = resume_run(folder, backend, device, has_phases=True)
            run, chosen = found.run, found.backend
            options = Options(found.device, found.allow_lossy, threads=found.threads)
        else:
            check_new(folder)
            run, chosen = validate(RunConfig, spec.config), choose_backend(backend)
            options = Options(device, is_new=True)
        train_phases(run, folder, chosen, spec.n_phases, options, Console())
    except TrainingStopped as stopped:
        print(stopped)
        return stopped.exit_code
    except InputError as error:
        print(error)
        return HELD_ELSEWHERE if is_held(folder) else 2
    except KeyboardInterrupt:  # a second signal
        print("interrupted")
        return 128 + signal.SIGINT
    except BaseException as error:  # Rust panics do not derive from Exception
        line, code = describe_crash(error)
        print(line)
        return code
    return 0


def stop_with_the_sweep(pipe: int) -> None:
    """Send SIGTERM to this process, which then saves, when the sweep closes its end of the pipe or dies."""

    def wait() -> None:
        os.read(pipe, 1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def main() -> int:
    folder, name, backend, device, *descriptors = sys.argv[1:]
    del sys.argv[5:]  # keep them out of environment.json
    for descriptor in map(int, descriptors):
        os.set_inheritable(descriptor, False)
    if descriptors:
        stop_with_the_sweep(int(descriptors[0]))
    prepare_streams()
    return train_one(Path(folder), name, backend, device)


if __name__ == "__main__":
    sys.exit(main())
