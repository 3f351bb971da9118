"""A model run a layer at a time. B batch, T time, D model, V vocabulary, N tokens (B·T), K of E experts, L layers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from numpy.typing import NDArray

from mlx_moe.config import ModelConfig
from mlx_moe.device import Device
from mlx_moe.model.device import choose_device, keep_freed_buffers, on_its_device
from mlx_moe.model.layers import Norm
from mlx_moe.model.moe import Routing
from mlx_moe.model.transformer import Block
from mlx_moe.parameters import Weights
from mlx_moe.training.backend import Logits, RoutedLogits, Tokens
from mlx_moe.training.streamed_weights import embed, forced_experts, head

HEAD_ROWS = 8192  # words

Module = TypeVar("Module", bound=nn.Module)


class StreamedModel:
    """`mlx_moe.training.backend.StreamedModel` on MLX; it copies one layer at a time of weights that lie in a file."""

    def __init__(self, config: ModelConfig, weights: Weights, device: str | Device = "auto"):
        self.config = config
        self._weights = weights
        self.device = choose_device(device)
        keep_freed_buffers()

    @on_its_device
    def each_logits(self, tokens_BT: Tokens) -> Iterator[Logits]:
        normed_BTD, _ = self._final_hidden_states(tokens_BT, None)
        head_VD, sequences = head(self.config, self._weights), list(normed_BTD)
        return (self._logits(normed_TD, head_VD) for normed_TD in sequences)

    @on_its_device
    def routed_logits(self, tokens_BT: Tokens, experts_LNK: NDArray[np.int64] | None = None) -> RoutedLogits:
        normed_BTD, routings = self._final_hidden_states(tokens_BT, experts_LNK)
        logits_BTV = self._logits(normed_BTD, head(self.config, self._weights))
        found = [(np.array(routing.logits_NE), np.array(routing.experts_NK)) for routing in routings]
        return RoutedLogits.stack(logits_BTV, found)

    def ffn_inputs(self, tokens_BT: Tokens, layers: Collection[int]) -> Iterator[NDArray[np.float32]]:
        x_BTD = self._embed(tokens_BT)
        for layer in range(max(layers) + 1):
            x_BTD, read_ND = self._run_layer(layer, x_BTD)
            if layer in layers:
                yield read_ND

    @on_its_device
    def _run_layer(self, layer: int, x_BTD: mx.array) -> tuple[mx.array, NDArray[np.float32]]:
        """Return the residual stream after a layer, and the inputs (N, D) of its FFN."""
        block = self._block(layer)
        x_BTD = block.attend(x_BTD)
        read_ND = np.array(block.ffn_input(x_BTD).flatten(0, 1))
        x_BTD, _ = block.feed_forward(x_BTD)
        mx.eval(x_BTD)
        mx.clear_cache()  # frees the layer
        return x_BTD, read_ND

    def _embed(self, tokens_BT: Tokens) -> mx.array:
        return mx.array(embed(self.config, self._weights, tokens_BT))

    def _final_hidden_states(
        self, tokens_BT: Tokens, experts_LNK: NDArray[np.int64] | None
    ) -> tuple[mx.array, list[Routing]]:
        x_BTD, routings = self._embed(tokens_BT), []
        forced = forced_experts(self.config, experts_LNK)
        for layer in range(self.config.n_layers):
            experts_NK = mx.array(forced[layer], mx.int32) if layer in forced else None
            x_BTD, routing = self._block(layer)(x_BTD, None, experts_NK)
            if routing is not None:
                routings.append(routing)
            mx.eval(x_BTD, routings)
            mx.clear_cache()  # lets go of the layer
        return self._load(Norm, "norm.")(x_BTD), routings

    def _block(self, layer: int) -> Block:
        return self._load(partial(Block, layer=layer), f"layers.{layer}.")

    def _load(self, kind: Callable[[ModelConfig], Module], prefix: str) -> Module:
        module = kind(self.config)
        module.load_weights(
            [(name, mx.array(self._weights[prefix + name])) for name, _ in tree_flatten(module.parameters())]
        )
        module.eval()
        return module

    @on_its_device
    def _logits(self, normed: mx.array, head_VD: NDArray[np.float32]) -> Logits:
        """Return (…, V), computed by a part of the head at a time: it is often the largest tensor."""
        logits = np.empty((*normed.shape[:-1], len(head_VD)), np.float32)
        for start in range(0, len(head_VD), HEAD_ROWS):
            part = slice(start, start + HEAD_ROWS)
            logits[..., part] = np.array(normed @ mx.array(head_VD[part]).T)
            mx.clear_cache()
        return logits
