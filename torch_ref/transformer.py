"""The language model: embeddings, blocks, norm, head. B batch, T time, D model, V vocabulary."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mlx_moe.config import ModelConfig
from mlx_moe.device import Device
from mlx_moe.training.backend import Tokens
from torch_ref.attention import Attention, KVCache, rotations
from torch_ref.device import to_device
from torch_ref.layers import FFN, Linear, Norm
from torch_ref.moe import ExpertLinear, MoE, Routing


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = Norm(config)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = Norm(config)
        has_experts = layer in config.expert_layers
        self.mlp = MoE(config, config.moe) if config.moe and has_experts else FFN(config, config.d_ff)
        self.dropout = nn.Dropout(config.dropout)
        self._pre_norm = config.norm_position == "pre"

    def forward(
        self,
        x_BTD: Tensor,
        cache: KVCache | None = None,
        experts_NK: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> tuple[Tensor, Routing | None]:
        return self.feed_forward(self.attend(x_BTD, cache, dtype), experts_NK, dtype)

    def attend(self, x_BTD: Tensor, cache: KVCache | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the residual stream after attention."""
        if self._pre_norm:
            return x_BTD + self.dropout(self.self_attn(self.input_layernorm(x_BTD).to(dtype), cache))
        after: Tensor = self.input_layernorm(x_BTD + self.dropout(self.self_attn(x_BTD.to(dtype), cache)))
        return after

    def ffn_input(self, x_BTD: Tensor) -> Tensor:
        """Return the FFN's or router's input, from the residual stream after attention."""
        return self.post_attention_layernorm(x_BTD) if self._pre_norm else x_BTD

    def feed_forward(
        self, x_BTD: Tensor, experts_NK: Tensor | None = None, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Routing | None]:
        """Return the residual stream after the block, from that after attention."""
        y_BTD, routing = self._feed_forward(self.ffn_input(x_BTD).to(dtype), experts_NK)
        x_BTD = x_BTD + self.dropout(y_BTD)
        return x_BTD if self._pre_norm else self.post_attention_layernorm(x_BTD), routing

    def _feed_forward(self, x_BTD: Tensor, experts_NK: Tensor | None) -> tuple[Tensor, Routing | None]:
        return self.mlp(x_BTD, experts_NK) if isinstance(self.mlp, MoE) else (self.mlp(x_BTD), None)


class Transformer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = _embedding(config.vocab_size, config.d_model)
        learned = config.position_encoding == "learned_absolute"
        self.embed_positions = _embedding(config.context_length, config.d_model) if learned else None
        self.layers = nn.ModuleList([Block(config, layer) for layer in range(config.n_layers)])
        self.norm = Norm(config)
        self.lm_head = None if config.weight_tying else Linear(config.d_model, config.vocab_size, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self.activation_checkpointing = False
        self.context_length = config.context_length

    def forward(
        self,
        tokens_BT: Tensor,
        cache: list[KVCache] | None = None,
        experts: Mapping[int, Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
        hidden_only: bool = False,
    ) -> tuple[Tensor, list[Routing]]:
        """Return (logits (B, T, V) in `dtype`, the routing of every MoE layer).

        With a cache, tokens continue those in it. `experts` forces the choices of these layers. Matrix products take
        and give `dtype`; the residual stream, norms and routers stay in float32. `hidden_only` leaves the head out:
        the first result is then the head's input, (B, T, D).
        """
        x_BTD = self.embed_tokens(tokens_BT)
        if self.embed_positions is not None:
            start = cache[0].length if cache else 0
            positions_T = torch.arange(start, start + tokens_BT.shape[1], device=tokens_BT.device)
            x_BTD = x_BTD + self.embed_positions(positions_T)
        x_BTD = self.dropout(x_BTD)
        routings = []
        for i, layer in enumerate(self.layers):
            if self.activation_checkpointing and self.training:
                x_BTD, routing = checkpoint(layer, x_BTD, dtype=dtype, use_reentrant=False)
            else:
                forced_NK = experts.get(i) if experts else None
                x_BTD, routing = layer(x_BTD, cache[i] if cache else None, forced_NK, dtype)
            if routing is not None:
                routings.append(routing)
        x_BTD = self.norm(x_BTD).to(dtype)
        if hidden_only:
            return x_BTD, routings
        return F.linear(x_BTD, self.head.to(dtype)), routings

    @property
    def head(self) -> Tensor:
        """Weights of the head, (V, D): the embeddings where they are tied."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def compile_blocks(self) -> None:
        """Compile each block by itself from now on: the second one finds the first one's code."""
        # Marked here and not where they are defined, since it takes two seconds to load the compiler.
        torch.compiler.assume_constant_result(rotations)
        for module in self.modules():
            if isinstance(module, ExpertLinear):
                module.stay_out_of_graphs()
        for layer in self.layers:
            layer.compile()


class Decoder:
    """`mlx_moe.inference.decoder.Decoder` on PyTorch."""

    def __init__(self, model: Transformer, device: Device):
        self._model = model
        self._device = device
        self._cache = [KVCache(model.context_length) for _ in model.layers]

    @property
    def length(self) -> int:
        return self._cache[0].length

    @torch.no_grad()
    def __call__(self, tokens_BT: Tokens) -> NDArray[np.float32]:
        logits_BTV, _ = self._model(to_device(tokens_BT, self._device), self._cache)
        return logits_BTV[:, -1].float().cpu().numpy()


def _embedding(n: int, d_model: int) -> nn.Embedding:
    """Return an embedding without initial weights, as Linear has none."""
    return nn.Embedding.from_pretrained(torch.empty(n, d_model), freeze=False)
