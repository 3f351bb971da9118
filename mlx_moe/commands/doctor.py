"""Diagnosis of this machine: devices, versions, and what is missing."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import sys

from mlx_moe.config import ModelConfig, OptimizerConfig
from mlx_moe.errors import InputError, one_line
from mlx_moe.extras import how_to_install
from mlx_moe.parameters import initialize
from mlx_moe.training.backend import TRAINERS, Backend, choose_backend, is_installed
from mlx_moe.training.console import Console
from mlx_moe.training.environment import library_versions


def diagnose() -> int:
    """Print the device and versions; build a tiny model on each backend. Returns 0, or 1 where no backend works."""
    console = Console()
    console.summary(
        [
            ("machine", f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"),
            ("python", platform.python_version()),
            *((library, version or "missing") for library, version in library_versions().items()),
        ]
    )
    console.line()
    tiny = ModelConfig(vocab_size=16, context_length=8, d_model=8, n_layers=1, n_heads=2)
    works = 0
    for name in TRAINERS:
        if not is_installed(name):
            console.line(f"{name:6} missing; {how_to_install(name)}")
            continue
        try:
            trainer = Backend(name, "").trainer(tiny, initialize(tiny, 0), OptimizerConfig())
            works += 1
            console.line(f"{name:6} works, on {trainer.device.label}")
        except (ImportError, OSError, RuntimeError) as error:
            console.line(f"{name:6} is installed and fails: {one_line(error, limit=None)}")
    if is_installed("mlx"):
        model = importlib.import_module("mlx_moe.model")
        console.line(f"{'blas':6} {model.FAST_BLAS}")
        if sys.platform == "linux" and shutil.which("g++") is None:
            console.line(
                f"{'g++':6} missing: MLX fuses its CPU steps with it, and is slower without; apt-get install g++"
            )
    try:
        console.line(f"{'auto':6} {choose_backend().reason}")
    except InputError as error:
        console.line(f"{'auto':6} {error}")
    return 0 if works else 1
