"""Floating-point operations per token.

A product of (m, k) with (k, n) counts 2·m·n·k operations. Attention counts all T × T pairs, as PyTorch's flop counter
does and as unfused kernels compute it; a kernel that skips masked pairs does half of that.

D model, Q query heads' width, G key-value heads' width, F neurons that a token visits, E experts, K experts per token,
T time, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from mlx_moe.config import ModelConfig
from mlx_moe.parameters import FFN_INPUTS

# Operations per element; an exponential or error function counts as one.
NORMALIZATION = {"layernorm": 7, "layernorm_nobias": 6, "rmsnorm": 4}
ACTIVATION = {"gelu": 4, "gelu_tanh": 8, "silu": 3, "relu": 1, "leaky_relu": 2}
SOFTMAX = 5  # maximum, difference, exponential, sum, quotient
ROTATION = 3  # two products and a sum


@dataclass(frozen=True)
class Flops:
    """Operations of the forward pass per token.

    `projections`, `attention`, `router`, `ffn` and `head` are matrix products, `elementwise` is the rest.
    """

    projections: int
    attention: int
    router: int
    ffn: int
    head: int
    elementwise: int
    gradients: int = 2  # per product: by its input and its weight; only the former if the weight is frozen

    @property
    def forward(self) -> int:
        """Matrix products of the forward pass."""
        return self.projections + self.attention + self.router + self.ffn + self.head

    @property
    def training(self) -> int:
        """Matrix products forward and backward; each product has `gradients` gradients of its own size.

        Recomputation in the backward pass (attention's scores in fused kernels, activation checkpointing) is not
        counted, as in PaLM's model FLOPs (Chowdhery et al. 2022, appendix B); neither are adapters.
        """
        return (1 + self.gradients) * self.forward

    def to_json(self) -> dict[str, int]:
        return {
            "forward": self.forward,
            "training": self.training,
            "forward_elementwise": self.elementwise,
            "forward_projections": self.projections,
            "forward_attention": self.attention,
            "forward_router": self.router,
            "forward_ffn": self.ffn,
            "forward_head": self.head,
        }


def flops_per_token(config: ModelConfig) -> Flops:
    """Return the operations per token of a sequence of `context_length`."""
    D, T = config.d_model, config.context_length
    Q, G = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    n_mixtures, n_experts = len(config.expert_layers), config.moe.n_experts if config.moe else 0
    n_dense = config.n_layers - n_mixtures
    F, n_ffns, residual = n_dense * config.d_ff, n_dense, 2 * D * config.n_layers  # of all layers
    if config.moe:
        top_k, shared = config.moe.top_k, config.moe.shared_d_ff
        F += n_mixtures * (top_k * config.expert_d_ff + shared)
        n_ffns += n_mixtures * (top_k + (shared > 0))
        residual += n_mixtures * (2 * top_k + (shared > 0)) * D  # weighting and summing the experts' outputs
    n_inputs = len(FFN_INPUTS[config.ffn_type])

    norms = (2 * config.n_layers + 1) * NORMALIZATION[config.normalization] * D
    rotations = ROTATION * (Q + G) if config.position_encoding == "rope" else 0
    neurons = F * (ACTIVATION[config.activation] + (config.ffn_type == "swiglu"))
    head_norms = NORMALIZATION["rmsnorm"] * (Q + G) if config.qk_norm else 0
    biases = {"none": 0, "qkv": Q + 2 * G, "qkvo": Q + 2 * G + D}[config.attention_bias]
    ffn_biases = n_inputs * F + n_ffns * D if config.bias else 0
    softmaxes = SOFTMAX * (config.n_layers * config.n_heads * T + n_mixtures * n_experts)
    return Flops(
        projections=config.n_layers * 2 * D * (Q + 2 * G + Q),
        attention=config.n_layers * 2 * 2 * T * Q,
        router=n_mixtures * 2 * D * n_experts,
        ffn=2 * (n_inputs + 1) * D * F,
        head=2 * D * config.vocab_size,
        elementwise=norms
        + config.n_layers * (head_norms + rotations + biases)
        + (neurons + ffn_biases + softmaxes + residual)
        + SOFTMAX * config.vocab_size,
        gradients=1 if config.lora else 2,
    )


def mfu(flops: Flops, tokens_per_s: float, peak_flops_per_s: float) -> float:
    """Return the model FLOPs utilisation, 0 to 1: the share of a machine's peak (Chowdhery et al. 2022)."""
    return flops.training * tokens_per_s / peak_flops_per_s
