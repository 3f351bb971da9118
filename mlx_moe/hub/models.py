"""Opening of models: a checkpoint of ours, or a folder in Hugging Face's format."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mlx_moe.config import ModelConfig
from mlx_moe.errors import InputError, brief_name
from mlx_moe.hub.foreign import ADAPTER, read_settings
from mlx_moe.hub.layout import find, unpack
from mlx_moe.hub.read_config import read_config
from mlx_moe.hub.resolve import model_name
from mlx_moe.parameters import LazyWeights, Weights
from mlx_moe.storage import checkpoint
from mlx_moe.storage.checkpoint import Checkpoint, TrainerState
from mlx_moe.storage.reading import is_folder
from mlx_moe.storage.tensor_files import check_finite, open_tensors

ORIGIN = "huggingface"  # in place of the backend, for weights that neither backend trained


def open_model(path: Path) -> Checkpoint:
    """Open a checkpoint, a run's latest or best one, or a model in Hugging Face's format.

    Raises InputError if it is missing, damaged, or not describable by ModelConfig.
    """
    check_place(path)
    if not is_model_folder(path):
        return checkpoint.load(path)
    config, weights = read_model(path)
    return Checkpoint(path, config, imported_state(path, config), weights)


def check_place(path: Path) -> None:
    """Raise InputError unless a path is a folder, or `best` in a folder."""
    if not is_folder(path) and not (path.name == "best" and is_folder(path.parent)):
        raise InputError(f"no checkpoint at {brief_name(str(path), limit=400)}: there is no such folder")


def with_finite_weights(source: Checkpoint, remedy: str = "get the model anew") -> Checkpoint:
    """Return the model with checked weights: reading a tensor that holds NaN or Inf raises InputError naming it."""
    checked: set[str] = set()

    def read(name: str) -> NDArray[np.float32]:
        array = source.weights[name]
        if name not in checked:
            check_finite(name, array, source.path, remedy)
            checked.add(name)
        return array

    return replace(source, weights=LazyWeights(source.weights, read))


def is_model_folder(path: Path) -> bool:
    """Return whether a folder looks like Hugging Face's format, and not like a checkpoint or a run."""
    if not os.path.isdir(path):
        return False
    if any((path / name).is_file() for name in (checkpoint.MANIFEST, checkpoint.STATE, "config.yaml")):
        return False
    if any((path / name).is_file() for name in (checkpoint.CONFIG, ADAPTER)):
        return True
    return any(path.glob("*.safetensors")) or any(path.glob("*.bin"))


def read_model(folder: Path) -> tuple[ModelConfig, Weights]:
    """Return the architecture and float32 weights of a model in Hugging Face's format.

    Raises InputError if they disagree.
    """
    if not is_folder(folder):
        raise InputError(f"no model at {brief_name(str(folder), limit=400)}: there is no such folder")
    read_settings(folder)  # before the weights: refuses folders without config.json, and folders with code
    tensors = open_tensors(folder)
    family, config = read_config(folder, tensors)
    return config, unpack(find(folder, tensors, family, config), config)


def imported_state(folder: Path, config: ModelConfig) -> TrainerState:
    return TrainerState(2 if config.moe else 1, 0, ORIGIN, lineage=(model_name(folder),))
