"""Size of a model from its config alone, in constant time, to compare with its files before anything is allocated.

D model, F ffn, E experts, V vocabulary.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from mlx_moe.config import ModelConfig
from mlx_moe.errors import InputError
from mlx_moe.parameters import FFN_INPUTS
from mlx_moe.storage.atomic import absolute
from mlx_moe.storage.tensor_files import StoredTensor, n_elements

BYTES = 4  # of a float32
LEEWAY = 16  # times the files' contents; below, the message names the missing or misshapen tensor instead


def least_parameters(config: ModelConfig) -> int:
    """Return the number of values in matrices, embeddings and routers: all but norms, biases and an untied head.

    Unlike `count_parameters` it builds no table, so its cost does not depend on the number of layers.
    """
    D, moe = config.d_model, config.moe
    attention = 2 * D * config.head_dim * (config.n_heads + config.n_kv_heads)
    matrices = 1 + len(FFN_INPUTS[config.ffn_type])
    n_mixtures = _n_mixtures(config)
    total = config.vocab_size * D + config.n_layers * attention
    total += (config.n_layers - n_mixtures) * matrices * D * config.d_ff
    if moe is not None:
        experts = moe.n_experts * (D + matrices * D * config.expert_d_ff)
        total += n_mixtures * (experts + matrices * D * moe.shared_d_ff)
    return total


def check_config_fits_files(
    file: Path, config: ModelConfig, tensors: Mapping[str, StoredTensor], one_tensor_each: bool
) -> None:
    """Raise InputError if config.json describes more than the files hold; `one_tensor_each`: per expert."""
    needed, there, what = least_parameters(config), n_elements(tensors), "values"
    if needed <= LEEWAY * there and config.moe and one_tensor_each:
        needed, there, what = _n_mixtures(config) * config.moe.n_experts, len(tensors), "tensors"
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
    needed, free = BYTES * least_parameters(config), shutil.disk_usage(place).free
    if needed > free:
        raise InputError(
            f"the model takes {needed / 1e9:,.1f} GB, and the disk of {out} has {free / 1e9:,.1f} GB free; make room, "
            "or ask for a smaller one"
        )


def _n_mixtures(config: ModelConfig) -> int:
    """Return the number of layers with experts, without listing them as `config.expert_layers` would."""
    if config.moe is None:
        return 0
    return config.n_layers if config.moe.layers is None else len(config.moe.layers)
