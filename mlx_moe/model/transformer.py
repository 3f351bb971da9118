"""The language model: embeddings, blocks, norm, head. B batch, T time, D model, V vocabulary."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_moe.config import ModelConfig
from mlx_moe.model.attention import Attention, KVCache
from mlx_moe.model.layers import FFN, Norm
from mlx_moe.model.moe import MoE, Routing


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.input_layernorm = Norm(config)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = Norm(config)
        self.mlp = MoE(config, config.moe) if config.moe else FFN(config)
        self.dropout = nn.Dropout(config.dropout)
        self._pre_norm = config.norm_position == "pre"

    def __call__(
        self, x_BTD: mx.array, cache: KVCache | None = None, experts_NK: mx.array | None = None
    ) -> tuple[mx.array, Routing | None]:
        if self._pre_norm:
            x_BTD = x_BTD + self.dropout(self.self_attn(self.input_layernorm(x_BTD), cache))
            y_BTD, routing = self._feed_forward(self.post_attention_layernorm(x_BTD), experts_NK)
            return x_BTD + self.dropout(y_BTD), routing
        x_BTD = self.input_layernorm(x_BTD + self.dropout(self.self_attn(x_BTD, cache)))
        y_BTD, routing = self._feed_forward(x_BTD, experts_NK)
        return self.post_attention_layernorm(x_BTD + self.dropout(y_BTD)), routing

    def _feed_forward(self, x_BTD: mx.array, experts_NK: mx.array | None) -> tuple[mx.array, Routing | None]:
        return self.mlp(x_BTD, experts_NK) if isinstance(self.mlp, MoE) else (self.mlp(x_BTD), None)


class Transformer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        if config.position_encoding == "learned_absolute":
            self.embed_positions = nn.Embedding(config.context_length, config.d_model)
        self.layers = [Block(config) for _ in range(config.n_layers)]
        self.norm = Norm(config)
        if not config.weight_tying:
            self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def __call__(
        self, tokens_BT: mx.array, cache: list[KVCache] | None = None, experts: list[mx.array] | None = None
    ) -> tuple[mx.array, list[Routing]]:
        """Returns (logits (B, T, V), the routing of every MoE layer).

        With a cache, tokens continue what it holds. `experts` forces every layer's choices.
        """
        x_BTD = self.embed_tokens(tokens_BT)
        if "embed_positions" in self:
            start = cache[0].length if cache else 0
            x_BTD = x_BTD + self.embed_positions(mx.arange(start, start + tokens_BT.shape[1]))
        x_BTD = self.dropout(x_BTD)
        routings = []
        for i, layer in enumerate(self.layers):
            x_BTD, routing = layer(x_BTD, cache[i] if cache else None, experts[i] if experts else None)
            if routing is not None:
                routings.append(routing)
        x_BTD = self.norm(x_BTD)
        logits_BTV = self.lm_head(x_BTD) if "lm_head" in self else self.embed_tokens.as_linear(x_BTD)
        return logits_BTV, routings
