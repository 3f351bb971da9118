"""Checkpoints outside a run, as `mlxmoe upcycle` and `mlxmoe import` write them."""

from mlx_moe.storage.atomic import creating
from mlx_moe.storage.checkpoint import fill


def create(path, config, state, blocks, tokenizer=None):
    """Write a checkpoint to a path that is free, block by block, without optimizer state."""
    with creating(path) as partial:
        fill(partial, config, state, blocks, tokenizer)
