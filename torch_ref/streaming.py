"""A model run a layer at a time. B batch, T time, D model, V vocabulary, N tokens (B·T), K of E experts, L layers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from mlx_moe.config import ModelConfig
from mlx_moe.device import Device
from mlx_moe.parameters import Weights
from mlx_moe.training.backend import Logits, RoutedLogits, Tokens
from mlx_moe.training.streamed_weights import embed, forced_experts, head
from torch_ref.device import choose_device, torch_device
from torch_ref.layers import Norm
from torch_ref.moe import Routing
from torch_ref.transformer import Block

Module = TypeVar("Module", bound=nn.Module)


class StreamedModel:
    """`mlx_moe.training.backend.StreamedModel` on PyTorch; on the CPU it copies no weights that lie in a file."""

    def __init__(self, config: ModelConfig, weights: Weights, device: str | Device = "auto"):
        self.config = config
        self._weights = weights
        self._device = torch_device(choose_device(device))

    def each_logits(self, tokens_BT: Tokens) -> Iterator[Logits]:
        normed_BTD, _ = self._final_hidden_states(tokens_BT, None)
        head_VD = self._array(head(self.config, self._weights))
        return (F.linear(normed_TD, head_VD).cpu().numpy() for normed_TD in normed_BTD)

    def routed_logits(self, tokens_BT: Tokens, experts_LNK: NDArray[np.int64] | None = None) -> RoutedLogits:
        normed_BTD, routings = self._final_hidden_states(tokens_BT, experts_LNK)
        logits_BTV = F.linear(normed_BTD, self._array(head(self.config, self._weights))).cpu().numpy()
        found = [(routing.logits_NE.cpu().numpy(), routing.experts_NK.cpu().numpy()) for routing in routings]
        return RoutedLogits.stack(logits_BTV, found)

    @torch.no_grad()
    def ffn_inputs(self, tokens_BT: Tokens, layers: Collection[int]) -> Iterator[NDArray[np.float32]]:
        x_BTD = self._embed(tokens_BT)
        for layer in range(max(layers) + 1):
            block = self._block(layer)
            x_BTD = block.attend(x_BTD)
            if layer in layers:
                yield block.ffn_input(x_BTD).flatten(0, 1).cpu().numpy()
            x_BTD, _ = block.feed_forward(x_BTD)

    def _embed(self, tokens_BT: Tokens) -> Tensor:
        return self._array(embed(self.config, self._weights, tokens_BT))

    @torch.no_grad()
    def _final_hidden_states(
        self, tokens_BT: Tokens, experts_LNK: NDArray[np.int64] | None
    ) -> tuple[Tensor, list[Routing]]:
        x_BTD, routings = self._embed(tokens_BT), []
        forced = forced_experts(self.config, experts_LNK)
        for layer in range(self.config.n_layers):
            experts_NK = self._array(forced[layer]) if layer in forced else None
            x_BTD, routing = self._block(layer)(x_BTD, None, experts_NK)
            if routing is not None:
                routings.append(routing)
        return self._load(Norm, "norm.")(x_BTD), routings

    def _block(self, layer: int) -> Block:
        return self._load(partial(Block, layer=layer), f"layers.{layer}.")

    def _load(self, kind: Callable[[ModelConfig], Module], prefix: str) -> Module:
        with torch.device("meta"):
            module = kind(self.config).eval()
        module.load_state_dict(
            {name: self._array(self._weights[prefix + name]) for name in module.state_dict()}, assign=True
        )
        return module

    def _array(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self._device)
