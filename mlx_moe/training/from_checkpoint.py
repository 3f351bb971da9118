"""Runs that start from an existing model: settings that it fixes, and those that remain free."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mlx_moe.config import RunConfig
from mlx_moe.errors import InputError
from mlx_moe.phases import check_start, lineage_so_far
from mlx_moe.presets import load_run
from mlx_moe.storage.checkpoint import Checkpoint
from mlx_moe.storage.tensor_files import open_tensors, sha256
from mlx_moe.validation import by_path

# Settings of training, which the model does not fix. Load-balancing coefficients do not affect its output.
CHANGEABLE_SETTINGS = (
    "dropout",
    "context_length",
    "attention_backend",
    "moe.load_balance_coefficient",
    "moe.z_loss_coefficient",
)


def start_from(
    source: Checkpoint,
    phases: Sequence[int],
    preset: str,
    file: Path | None = None,
    overrides: Sequence[str] = (),
    steps: int | None = None,
) -> RunConfig:
    """Return the config of a run of these phases from a model, with its architecture and tokenizer; else as `load_run`.

    Raises InputError if the phases do not fit the model, or if a setting contradicts it.
    """
    if source.tokenizer_folder is None:
        raise InputError(f"{source.path} has no tokenizer, so no text fits it; put its tokenizer.json beside it")
    tokenizer = str(source.tokenizer_folder.resolve())
    origin = source.state.lineage or (source.config.display_name,)
    lineage = lineage_so_far(replace(source.state, lineage=origin))
    fixed_by_model = {
        "name": lineage[0].rpartition("/")[2],
        "start": {"model": str(source.path.resolve()), "phases": phases, "lineage": lineage},
        "model": source.config.model_dump(mode="json"),
        "data": {"tokenizer": tokenizer},
    }
    run = load_run(preset, file, overrides, steps=steps, fixed_by_model=fixed_by_model)
    if run.data.tokenizer != tokenizer:
        raise InputError(
            f"tokenizer {run.data.tokenizer}: {source.path} works only with its own tokenizer; leave it out"
        )
    check_model(run, source)
    check_start(run, str(source.path))
    return run


def weights_sha256(folder: Path) -> str:
    """Hash the files that hold a model's weights, in the order of their names (SHA-256)."""
    digest = hashlib.sha256()
    for file in sorted({tensor.file for tensor in open_tensors(folder).values()}):
        digest.update(sha256(file).encode())
    return digest.hexdigest()


def check_model(run: RunConfig, source: Checkpoint) -> None:
    """Raise InputError if the run's initial model differs from the source."""
    theirs = by_path(source.config.model_dump())
    for key, value in by_path(run.model.model_dump()).items():
        if key not in CHANGEABLE_SETTINGS and theirs.get(key) != value:
            raise InputError(f"model.{key} {value}: {source.path} has {theirs.get(key)}; leave it out")
    ours, longest = run.model.context_length, source.config.context_length
    if ours > longest or (ours < longest and run.model.position_encoding == "learned_absolute"):
        raise InputError(
            f"model.context_length {ours}: {source.path} has {longest}; leave it out"
            + (f", or take less than {longest}" if ours > longest else ": each position was learned")
        )
