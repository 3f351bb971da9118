"""Import of a Hugging Face model as a checkpoint."""

from __future__ import annotations

import os
from pathlib import Path

from mlx_moe.accounting import count_parameters
from mlx_moe.data.tokenizers import Tokenizer
from mlx_moe.errors import InputError
from mlx_moe.hub.models import imported_state, read_model, with_finite_weights
from mlx_moe.hub.resolve import find_model
from mlx_moe.hub.sizes import check_room
from mlx_moe.storage import checkpoint
from mlx_moe.storage.atomic import creating
from mlx_moe.storage.checkpoint import Checkpoint
from mlx_moe.storage.reading import own_file
from mlx_moe.training.console import Console


def import_model(name: str, out: Path, allow_nonfinite: bool = False) -> None:
    """Write a Hugging Face model, by folder or hub name, as a checkpoint with its tokenizer.

    Raises InputError if `out` exists or is being written, and, unless `allow_nonfinite`, for NaN or Inf.
    """
    with creating(out) as partial:
        folder, console = find_model(name), Console()
        if os.path.isfile(folder / checkpoint.MANIFEST):
            raise InputError(f"{folder} is a checkpoint already; use it as it is")
        config, weights = read_model(folder)
        check_room(out, config)
        source = Checkpoint(folder, config, imported_state(folder, config), weights)
        if not allow_nonfinite:
            source = with_finite_weights(source, "get the model anew; --allow-nonfinite takes it as it is")
        tokenizer = folder if own_file(folder, "tokenizer.json") else None
        if tokenizer is None:
            console.warn(f"{folder} has no tokenizer.json; the checkpoint is without a tokenizer")
        elif (size := Tokenizer.load(folder).vocab_size) > config.vocab_size:
            raise InputError(f"{folder}: tokenizer.json has {size} tokens, the model only {config.vocab_size}")
        checkpoint.fill(partial, config, source.state, lambda name: [source.weights[name]], tokenizer)
    console.parameters(count_parameters(config), config.display_name)
    console.line(f"wrote {out}")
