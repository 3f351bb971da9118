"""The language model: embeddings, blocks, norm, head. B batch, T time, D model, V vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.nn.utils import checkpoint
from numpy.typing import NDArray

from mlx_moe.config import ModelConfig
from mlx_moe.device import Device
from mlx_moe.model.attention import Attention, KVCache
from mlx_moe.model.device import on_its_device
from mlx_moe.model.functional import linear
from mlx_moe.model.layers import FFN, Linear, Norm, dropout
from mlx_moe.model.moe import MoE, Routing
from mlx_moe.training.backend import Tokens


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = Norm(config)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = Norm(config)
        has_experts = layer in config.expert_layers
        self.mlp = MoE(config, config.moe) if config.moe and has_experts else FFN(config, config.d_ff)
        self._dropout = config.dropout
        self._pre_norm = config.norm_position == "pre"

    def __call__(
        self,
        x_BTD: mx.array,
        cache: KVCache | None = None,
        experts_NK: mx.array | None = None,
        dtype: mx.Dtype = mx.float32,
        dropout_keys: Sequence[mx.array | None] = (None, None),
    ) -> tuple[mx.array, Routing | None]:
        key_attention, key_ffn = dropout_keys
        x_BTD = self.attend(x_BTD, cache, dtype, key_attention)
        return self.feed_forward(x_BTD, experts_NK, dtype, key_ffn)

    def attend(
        self,
        x_BTD: mx.array,
        cache: KVCache | None = None,
        dtype: mx.Dtype = mx.float32,
        dropout_key: mx.array | None = None,
    ) -> mx.array:
        """Return the residual stream after attention."""
        p = self._dropout if self.training else 0.0
        if self._pre_norm:
            y_BTD = self.self_attn(self.input_layernorm(x_BTD).astype(dtype), cache)
            return x_BTD + dropout(y_BTD, p, dropout_key)
        y_BTD = self.self_attn(x_BTD.astype(dtype), cache)
        return self.input_layernorm(x_BTD + dropout(y_BTD, p, dropout_key))

    def ffn_input(self, x_BTD: mx.array) -> mx.array:
        """Return the FFN's or router's input, from the residual stream after attention."""
        return self.post_attention_layernorm(x_BTD) if self._pre_norm else x_BTD

    def feed_forward(
        self,
        x_BTD: mx.array,
        experts_NK: mx.array | None = None,
        dtype: mx.Dtype = mx.float32,
        dropout_key: mx.array | None = None,
    ) -> tuple[mx.array, Routing | None]:
        """Return the residual stream after the block, from that after attention."""
        p = self._dropout if self.training else 0.0
        y_BTD, routing = self._feed_forward(self.ffn_input(x_BTD).astype(dtype), experts_NK)
        x_BTD = x_BTD + dropout(y_BTD, p, dropout_key)
        return x_BTD if self._pre_norm else self.post_attention_layernorm(x_BTD), routing

    def _feed_forward(self, x_BTD: mx.array, experts_NK: mx.array | None) -> tuple[mx.array, Routing | None]:
        return self.mlp(x_BTD, experts_NK) if isinstance(self.mlp, MoE) else (self.mlp(x_BTD), None)


def _with_keys(
    block: Block, dtype: mx.Dtype, x_BTD: mx.array, *keys: mx.array | None
) -> tuple[mx.array, Routing | None]:
    return block(x_BTD, dtype=dtype, dropout_keys=[key if key is None else mx.stop_gradient(key) for key in keys])


class Transformer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        if config.position_encoding == "learned_absolute":
            self.embed_positions = nn.Embedding(config.context_length, config.d_model)
        self.layers = [Block(config, layer) for layer in range(config.n_layers)]
        self.norm = Norm(config)
        if not config.weight_tying:
            self.lm_head = Linear(config.d_model, config.vocab_size, bias=False)
        self._dropout = config.dropout
        self.activation_checkpointing = False
        self.context_length = config.context_length

    def __call__(
        self,
        tokens_BT: mx.array,
        cache: list[KVCache] | None = None,
        experts: Mapping[int, mx.array] | None = None,
        dtype: mx.Dtype = mx.float32,
        hidden_only: bool = False,
    ) -> tuple[mx.array, list[Routing]]:
        """Return (logits (B, T, V) in `dtype`, the routing of every MoE layer).

        With a cache, tokens continue those in it. `experts` forces the choices of these layers. Matrix products take
        and give `dtype`; the residual stream, norms and routers stay in float32. `hidden_only` leaves the head out:
        the first result is then the head's input, (B, T, D).
        """
        x_BTD = self.embed_tokens(tokens_BT)
        if "embed_positions" in self:
            start = cache[0].length if cache else 0
            x_BTD = x_BTD + self.embed_positions(mx.arange(start, start + tokens_BT.shape[1]))
        x_BTD = dropout(x_BTD, self._dropout if self.training else 0.0, None)
        routings = []
        for i, layer in enumerate(self.layers):
            keys: list[mx.array | None] = [None, None]
            if self._dropout and self.training:
                keys = [mx.random.randint(0, 1 << 31, (2,), mx.uint32) for _ in range(2)]
            if self.activation_checkpointing and self.training:
                x_BTD, routing = checkpoint(layer, partial(_with_keys, layer, dtype))(x_BTD, *keys)
            else:
                forced_NK = experts.get(i) if experts else None
                x_BTD, routing = layer(x_BTD, cache[i] if cache else None, forced_NK, dtype, keys)
            if routing is not None:
                routings.append(routing)
        x_BTD = self.norm(x_BTD).astype(dtype)
        if hidden_only:
            return x_BTD, routings
        return linear(x_BTD, self.head), routings

    @property
    def head(self) -> mx.array:
        """Weights of the head, (V, D): the embeddings where they are tied."""
        return (self.lm_head if "lm_head" in self else self.embed_tokens).weight


class Decoder:
    """`mlx_moe.inference.decoder.Decoder` on MLX."""

    def __init__(self, model: Transformer, device: Device):
        self.device = device
        self._model = model
        self._cache = [KVCache(model.context_length) for _ in model.layers]

    @property
    def length(self) -> int:
        return self._cache[0].length

    @on_its_device
    def __call__(self, tokens_BT: Tokens) -> NDArray[np.float32]:
        logits_BTV, _ = self._model(mx.array(tokens_BT), self._cache)
        return np.array(logits_BTV[:, -1].astype(mx.float32))
