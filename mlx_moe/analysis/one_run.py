"""One run of a sweep, as a process of its own: python -m mlx_moe.analysis.one_run FOLDER NAME BACKEND DEVICE."""

from __future__ import annotations

import sys
from pathlib import Path

from mlx_moe.config import RunConfig
from mlx_moe.errors import InputError
from mlx_moe.storage.reading import read_mapping
from mlx_moe.storage.run_folder import CONFIG
from mlx_moe.training.backend import choose_backend
from mlx_moe.training.console import Console
from mlx_moe.training.phases import Options, open_run, train
from mlx_moe.training.stopping import TrainingStopped
from mlx_moe.validation import validate

SWEEP = "sweep.json"


def train_one(out: Path, name: str, backend: str, device: str) -> int:
    """Train, or go on with, one run of a sweep; its exit code. What went wrong is its last line."""
    spec, folder = read_mapping(out / SWEEP)[name], out / name
    try:
        run = open_run(folder) if (folder / CONFIG).is_file() else validate(RunConfig, spec["config"])
        train(run, folder, choose_backend(backend), spec["n_phases"], Options(device), Console())
    except TrainingStopped as stopped:
        print(stopped, flush=True)
        return stopped.exit_code
    except InputError as error:
        print(error, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(train_one(Path(sys.argv[1]), *sys.argv[2:]))
