"""Checks of a model's size by its config alone, against its files and the disk, before anything is allocated."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from mlx_moe.config import ModelConfig
from mlx_moe.errors import InputError
from mlx_moe.storage.atomic import absolute
from mlx_moe.storage.tensor_files import StoredTensor, n_elements

BYTES = 4  # of a float32
LEEWAY = 16  # times the files' contents; below, the message names the missing or misshapen tensor instead


def check_config_fits_files(
    file: Path, config: ModelConfig, tensors: Mapping[str, StoredTensor], one_tensor_each: bool
) -> None:
    """Raise InputError if config.json describes more than the files hold; `one_tensor_each`: per expert."""
    needed, there, what = config.n_matrix_elements, n_elements(tensors), "values"
    if needed <= LEEWAY * there and config.moe and one_tensor_each:
        needed, there, what = len(config.expert_layers) * config.moe.n_experts, len(tensors), "tensors"
    if needed > LEEWAY * there:
        raise InputError(
            f"{file} describes a model of at least {needed:,} {what}, and the files hold {there:,}; "
            "it is not that of these weights"
        )


def check_room(out: Path, config: ModelConfig) -> None:
    """Raise InputError if the disk of a new folder has no space for the model in float32."""
    place = absolute(out)
    while not place.exists():
        place = place.parent
    needed, free = BYTES * config.n_matrix_elements, shutil.disk_usage(place).free
    if needed > free:
        raise InputError(
            f"the model takes {needed / 1e9:,.1f} GB, and the disk of {out} has {free / 1e9:,.1f} GB free; make room, "
            "or ask for a smaller one"
        )
