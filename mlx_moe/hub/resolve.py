"""Lookup of models by their names on the Hugging Face hub."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from mlx_moe.data.tokenizers import HUB_NAME
from mlx_moe.errors import InputError, brief_name, one_line
from mlx_moe.extras import require
from mlx_moe.storage.atomic import absolute
from mlx_moe.storage.tensor_files import INDEX, open_tensors
from mlx_moe.storage.tokenizer_files import FILES

PATTERNS = ["config.json", "model*.safetensors", INDEX, *FILES]


def find_model(name: str) -> Path:
    """Return a model's folder: itself, or huggingface_hub's copy of the model of that name, downloaded if needed.

    Raises InputError if there is no such folder, and no such model can be downloaded.
    """
    folder = absolute(Path(name)) if name.startswith("~") or "\0" in name else Path(name)
    is_best = folder.name == "best" and os.path.isdir(folder.parent)  # in a run
    if os.path.exists(folder) or is_best or not HUB_NAME.fullmatch(name):
        return folder
    require("huggingface_hub", f"{name}, a name on the Hugging Face hub,")
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        with contextlib.suppress(LocalEntryNotFoundError):
            folder = Path(snapshot_download(name, allow_patterns=PATTERNS, local_files_only=True))
            if _is_whole(folder):
                return folder
        # Ask briefly first: without a network, a download retries for half a minute and prints every attempt.
        HfApi().model_info(name, timeout=10)
        return Path(snapshot_download(name, allow_patterns=PATTERNS))
    except Exception as error:  # the remedy is the same for every failure on the way to the hub
        raise InputError(
            f"no folder {brief_name(name)}, and cannot get a model of that name from the Hugging Face hub "
            f"({one_line(error)}); name a folder that holds one"
        ) from None


def model_name(folder: Path) -> str:
    """Return the hub name of a model in huggingface_hub's cache, else its folder's name."""
    folder = folder.resolve()
    if folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--"):
        return folder.parents[1].name.removeprefix("models--").replace("--", "/")
    return folder.name


def _is_whole(folder: Path) -> bool:
    if not (folder / "config.json").is_file():
        return False
    try:
        return bool(open_tensors(folder))
    except InputError:
        return False
