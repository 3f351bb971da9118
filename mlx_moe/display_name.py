"""An architecture in one word."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlx_moe.config import ModelConfig


def display_name(config: ModelConfig) -> str:
    """E.g. `12L-12H-768D-RoPE-RMS-SwiGLU-PreNorm`."""
    heads = f"{config.n_heads}H" + (f"{config.n_kv_heads}KV" if config.n_kv_heads != config.n_heads else "")
    scaling = f"-{config.rope_scaling.rope_type}" if config.rope_scaling else ""
    position = {"rope": f"RoPE{scaling}", "learned_absolute": "Learned", "none": "NoPE"}
    norm = {"rmsnorm": "RMS", "layernorm": "LN", "layernorm_nobias": "LNnb"}
    activation = {
        "gelu": "GELU",
        "gelu_tanh": "GELUtanh",
        "silu": "SiLU",
        "relu": "ReLU",
        "leaky_relu": "LReLU",
    }
    ffn = (
        "SwiGLU"
        if (config.ffn_type, config.activation) == ("swiglu", "silu")
        else (activation.get(config.activation, config.activation) + ("-GLU" if config.ffn_type == "swiglu" else ""))
    )
    experts = f"-{config.moe.n_experts}E{config.moe.top_k}" if config.moe else ""
    encoding = position.get(config.position_encoding, config.position_encoding)
    return (
        f"{config.n_layers}L-{heads}-{config.d_model}D-{encoding}"
        f"-{norm.get(config.normalization, config.normalization)}-{ffn}-{config.norm_position.title()}Norm"
        f"{'-QKNorm' if config.qk_norm else ''}{experts}"
    )
