"""The whole model once more, in plain NumPy and in the dtype of its arrays, sharing no code with the backends.

T time, D model, H heads, G key-value heads, C head_dim, F ffn, E experts.
"""

from __future__ import annotations

import math

import numpy as np

ACTIVATIONS = {
    "gelu": lambda x: x * (1 + np.vectorize(math.erf, otypes=[x.dtype])(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "silu": lambda x: x / (1 + np.exp(-x)),
    "relu": lambda x: np.maximum(x, 0),
    "leaky_relu": lambda x: np.where(x > 0, x, 0.01 * x),
}


def logits(config, arrays, tokens_T):
    """Logits (T, V)."""
    x_TD = arrays["embed_tokens.weight"][tokens_T]
    if config.position_encoding == "learned_absolute":
        x_TD = x_TD + arrays["embed_positions.weight"][: len(tokens_T)]
    for layer in range(config.n_layers):
        block = Block(config, arrays, f"layers.{layer}.")
        for sublayer, norm in ((block.attention, "input_layernorm"), (block.mlp, "post_attention_layernorm")):
            if config.norm_position == "pre":
                x_TD = x_TD + sublayer(normalize(config, arrays, f"layers.{layer}.{norm}", x_TD))
            else:
                x_TD = normalize(config, arrays, f"layers.{layer}.{norm}", x_TD + sublayer(x_TD))
    x_TD = normalize(config, arrays, "norm", x_TD)
    return x_TD @ arrays["embed_tokens.weight" if config.weight_tying else "lm_head.weight"].T


def normalize(config, arrays, name, x_TD):
    if config.normalization != "rmsnorm":
        x_TD = x_TD - x_TD.mean(-1, keepdims=True)
    y_TD = x_TD / np.sqrt((x_TD**2).mean(-1, keepdims=True) + config.norm_eps) * arrays[f"{name}.weight"]
    return y_TD + arrays[f"{name}.bias"] if config.normalization == "layernorm" else y_TD


class Block:
    def __init__(self, config, arrays, prefix):
        self.config, self.arrays, self.prefix = config, arrays, prefix

    def linear(self, name, x, expert=...):
        y = x @ self.arrays[f"{self.prefix}{name}.weight"][expert].T
        return y + self.arrays[f"{self.prefix}{name}.bias"][expert] if self.config.bias else y

    def attention(self, x_TD):
        config, n_time = self.config, len(x_TD)
        q_HTC, k_GTC, v_GTC = (
            self.linear(f"self_attn.{name}_proj", x_TD).reshape(n_time, -1, config.head_dim).swapaxes(0, 1)
            for name in "qkv"
        )
        if config.position_encoding == "rope":
            q_HTC, k_GTC = rotate(config, q_HTC), rotate(config, k_GTC)
        output_HTC = np.empty_like(q_HTC)
        for head in range(config.n_heads):
            group = head * config.n_kv_heads // config.n_heads
            scores_TT = q_HTC[head] @ k_GTC[group].T / math.sqrt(config.head_dim)
            scores_TT = np.where(np.tri(n_time, dtype=bool), scores_TT, -np.inf)
            output_HTC[head] = softmax(scores_TT) @ v_GTC[group]
        return self.linear("self_attn.o_proj", output_HTC.swapaxes(0, 1).reshape(n_time, -1))

    def mlp(self, x_TD):
        if self.config.moe is None:
            return self.ffn("mlp.", x_TD)
        router_logits_TE = x_TD @ self.arrays[f"{self.prefix}mlp.router.weight"].T
        y_TD = np.zeros_like(x_TD)
        for time, router_logits_E in enumerate(router_logits_TE):
            chosen_K = np.argsort(-router_logits_E, kind="stable")[: self.config.moe.top_k]
            for expert, gate in zip(chosen_K, softmax(router_logits_E[chosen_K]), strict=True):
                y_TD[time] += gate * self.ffn("mlp.experts.", x_TD[time], expert)
        return y_TD

    def ffn(self, prefix, x_TD, expert=...):
        activation = ACTIVATIONS[self.config.activation]
        up_TF = self.linear(f"{prefix}up_proj", x_TD, expert)
        if self.config.ffn_type == "swiglu":
            inner_TF = activation(self.linear(f"{prefix}gate_proj", x_TD, expert)) * up_TF
        else:
            inner_TF = activation(up_TF)
        return self.linear(f"{prefix}down_proj", inner_TF, expert)


def rotate(config, x_HTC):
    half = config.head_dim // 2
    frequency = config.rope_theta ** -(np.arange(half) / half)
    angle = np.arange(x_HTC.shape[1])[:, None] * frequency
    cos, sin = np.cos(angle).astype(x_HTC.dtype), np.sin(angle).astype(x_HTC.dtype)
    first, second = x_HTC[..., :half], x_HTC[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def softmax(x):
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)
