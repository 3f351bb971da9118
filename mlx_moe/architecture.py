"""The architecture of a model as a frozen, validated config. Unknown keys are refused."""

from __future__ import annotations

from itertools import count
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from mlx_moe.errors import quoted
from mlx_moe.limits import (
    MAX_BELOW_ONE,
    MAX_CONTEXT_LENGTH,
    MAX_D_FF,
    MAX_D_MODEL,
    MAX_EXPERTS,
    MAX_FLOAT,
    MAX_HEAD_DIM,
    MAX_HEADS,
    MAX_LAYERS,
    MAX_PARAMETERS,
    MAX_RANK,
    MAX_TEXT,
    MAX_VOCAB_SIZE,
    MIN_FLOAT,
)

# Component names known to both backends, each a function in their `layers` or `attention`. CONTRIBUTING.md, "Recipes",
# lists what else a new component needs.
COMPONENTS: dict[str, list[str]] = {
    "normalization": ["layernorm", "layernorm_nobias", "rmsnorm"],
    "activation": ["gelu", "gelu_tanh", "silu", "relu", "leaky_relu"],
    "position_encoding": ["learned_absolute", "rope", "none"],
    "attention_backend": ["sdpa", "manual"],
    "ffn_type": ["standard", "swiglu"],
}


def _component(kind: str) -> Any:
    def known(name: str) -> str:
        if name not in COMPONENTS[kind]:
            raise ValueError(f"must be one of {', '.join(COMPONENTS[kind])}")
        return name

    return Annotated[str, AfterValidator(known)]


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number, not true or false")
    return value


def _plain_text(text: str) -> str:
    if "\0" in text:
        raise ValueError("holds a NUL byte; leave it out")
    return text


def _below_one(value: float) -> float:
    if value > MAX_BELOW_ONE:
        raise ValueError("is 1 in float32; lower it")
    return value


# Numbers other than `true`, which pydantic would read as 1, and text that can be a file's name.
Whole = Annotated[int, BeforeValidator(_no_bool)]
Real = Annotated[float, BeforeValidator(_no_bool)]
Positive = Annotated[Real, Field(ge=MIN_FLOAT, le=MAX_FLOAT)]
NotNegative = Annotated[Real, Field(ge=0, le=MAX_FLOAT)]
Fraction = Annotated[Real, Field(ge=0, le=1)]
BelowOne = Annotated[Real, Field(ge=0, lt=1), AfterValidator(_below_one)]
Text = Annotated[str, Field(min_length=1, max_length=MAX_TEXT), AfterValidator(_plain_text)]


class ExpertsConfig(Frozen):
    """Number of experts in a layer, number per token, and the coefficients that balance their load."""

    n_experts: Whole = Field(8, ge=1, le=MAX_EXPERTS)
    top_k: Whole = Field(2, ge=1, le=MAX_EXPERTS)
    load_balance_coefficient: NotNegative = 0.01
    z_loss_coefficient: NotNegative = 0.001

    @model_validator(mode="after")
    def _top_k_fits(self) -> ExpertsConfig:
        if self.top_k > self.n_experts:
            raise ValueError(f"top_k {self.top_k} is more than n_experts {self.n_experts}; lower top_k")
        return self


class MoEConfig(ExpertsConfig):
    """The experts of a model, and the layers that have them."""

    d_ff: Whole | None = Field(None, ge=1, le=MAX_D_FF)  # neurons per expert; null: the model's d_ff
    shared_d_ff: Whole = Field(0, ge=0, le=MAX_D_FF)  # neurons of an additional expert that every token visits; 0: none
    layers: tuple[Whole, ...] | None = None  # layers with experts, ascending, the others are dense; null: all


class RopeScaling(Frozen):
    """Lower RoPE frequencies for contexts beyond the original one.

    Pairs that turn less than `low_freq_factor` times in the original context slow down by `factor`, those that turn
    more than `high_freq_factor` times keep their speed (Llama 3.1). Without an original context all pairs slow down
    (linear scaling).
    """

    factor: Real = Field(ge=1, le=MAX_FLOAT)
    original_context_length: Whole = Field(0, ge=0, le=MAX_CONTEXT_LENGTH)
    low_freq_factor: Positive = 1.0
    high_freq_factor: Positive = 4.0

    @property
    def rope_type(self) -> Literal["linear", "llama3"]:
        return "llama3" if self.original_context_length else "linear"

    @model_validator(mode="after")
    def _low_is_below_high(self) -> RopeScaling:
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor {self.low_freq_factor:g} is not below high_freq_factor {self.high_freq_factor:g}; "
                "lower it"
            )
        return self


Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class LoRAConfig(Frozen):
    """Low-rank adapters beside frozen weights, W·x + alpha/rank · B·A·x (Hu et al. 2021), separate for each expert.

    By default on all projections, which is needed to match full training (QLoRA, Dettmers et al. 2023); adapters on
    attention alone would leave upcycled experts identical.
    """

    rank: Whole = Field(0, ge=0, le=MAX_RANK)  # 0: no adapters, all weights are trained
    alpha: Positive = 16.0
    targets: tuple[Projection, ...] = get_args(Projection)
    router: bool = True  # trained in full, without an adapter


def _default_d_ff(data: dict[str, Any]) -> int:
    """Return 4 × d_model, or 8/3 × d_model in steps of 32 for SwiGLU's three matrices (Shazeer 2020)."""
    d_model = data.get("d_model", 1)
    return 32 * max(1, round(d_model / 12)) if data.get("ffn_type") == "swiglu" else 4 * d_model


class ModelConfig(Frozen):
    """An architecture. `n_kv_heads`, `head_dim`, `d_ff` and `attention_bias` are derived from the rest if omitted."""

    architecture: Text = "simple"
    vocab_size: Whole = Field(50257, ge=2, le=MAX_VOCAB_SIZE)
    context_length: Whole = Field(256, ge=2, le=MAX_CONTEXT_LENGTH)
    d_model: Whole = Field(832, ge=2, le=MAX_D_MODEL)
    n_layers: Whole = Field(7, ge=1, le=MAX_LAYERS)
    n_heads: Whole = Field(8, ge=1, le=MAX_HEADS)
    n_kv_heads: Whole = Field(default_factory=lambda data: data.get("n_heads", 1), ge=1, le=MAX_HEADS)
    head_dim: Whole = Field(
        default_factory=lambda data: max(1, data.get("d_model", 1) // data.get("n_heads", 1)), ge=1, le=MAX_HEAD_DIM
    )
    normalization: _component("normalization") = "layernorm"  # type: ignore[valid-type]
    norm_eps: Positive = 1e-5
    norm_position: Literal["pre", "post"] = "pre"
    activation: _component("activation") = "gelu"  # type: ignore[valid-type]
    ffn_type: _component("ffn_type") = "standard"  # type: ignore[valid-type]
    d_ff: Whole = Field(default_factory=_default_d_ff, ge=1, le=MAX_D_FF)
    position_encoding: _component("position_encoding") = "rope"  # type: ignore[valid-type]
    rope_theta: Positive = 10_000.0
    rope_scaling: RopeScaling | None = None
    qk_norm: bool = False  # RMSNorm over each head's queries and keys, before the rotation (Qwen3)
    attention_backend: _component("attention_backend") = "sdpa"  # type: ignore[valid-type]
    bias: bool = True
    attention_bias: Literal["none", "qkv", "qkvo"] = Field(
        default_factory=lambda data: "qkvo" if data.get("bias", True) else "none"
    )
    weight_tying: bool = True
    dropout: BelowOne = 0.0
    init_std: Positive = 0.02
    moe: MoEConfig | None = None
    lora: LoRAConfig | None = None  # during training with adapters; a run sets them in its own section

    def adapter(self, projection: str) -> LoRAConfig | None:
        return self.lora if self.lora and projection in self.lora.targets else None

    @model_validator(mode="after")
    def _shapes_fit(self) -> ModelConfig:
        if "head_dim" not in self.model_fields_set and self.d_model % self.n_heads:
            nearby = (n for distance in count() for n in (self.n_heads - distance, self.n_heads + distance))
            nearest = next(n for n in nearby if 0 < n <= self.d_model and self.d_model % n == 0)
            raise ValueError(
                f"d_model {self.d_model} is not divisible by n_heads {self.n_heads}; "
                f"take n_heads {nearest}, or set head_dim"
            )
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not divisible by n_kv_heads {self.n_kv_heads}")
        if self.position_encoding == "rope" and self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; RoPE rotates pairs, so take an even one")
        if self.rope_scaling and self.position_encoding != "rope":
            raise ValueError(f"position_encoding {self.position_encoding} has no rope_scaling; leave that out")
        if self.moe and self.moe.layers is not None:
            known = [layer for layer in sorted(set(self.moe.layers)) if 0 <= layer < self.n_layers]
            if not known or known != list(self.moe.layers):
                raise ValueError(
                    f"moe.layers {quoted(list(self.moe.layers))} must rise, from 0 to {self.n_layers - 1} at most, and "
                    "be at least one; leave it out for experts in every layer"
                )
        if self.n_matrix_elements > MAX_PARAMETERS:
            raise ValueError(
                f"{self.n_matrix_elements:,} parameters; must be at most {MAX_PARAMETERS:,}; take fewer or smaller "
                "layers, or fewer experts"
            )
        return self

    @property
    def expert_layers(self) -> tuple[int, ...]:
        """Indices of the layers whose FFN is a mixture of experts, ascending."""
        if self.moe is None:
            return ()
        return tuple(range(self.n_layers)) if self.moe.layers is None else self.moe.layers

    @property
    def n_matrix_elements(self) -> int:
        """Number of elements of all matrices: everything but norms, biases and adapters. Needs no table of them."""
        D, Q, G = self.d_model, self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        n_ffn_matrices = 3 if self.ffn_type == "swiglu" else 2
        n_mixtures = len(self.expert_layers)
        rows = self.vocab_size * (1 if self.weight_tying else 2)
        rows += self.context_length if self.position_encoding == "learned_absolute" else 0
        rows += self.n_layers * 2 * (Q + G) + (self.n_layers - n_mixtures) * n_ffn_matrices * self.d_ff
        if self.moe:
            n_experts = self.moe.n_experts
            n_neurons = n_experts * self.expert_d_ff + self.moe.shared_d_ff
            rows += n_mixtures * (n_experts + n_ffn_matrices * n_neurons)
        return rows * D

    @property
    def expert_d_ff(self) -> int:
        """Number of neurons of one expert."""
        return self.moe.d_ff if self.moe and self.moe.d_ff else self.d_ff

    @property
    def display_name(self) -> str:
        """Short name of the architecture, e.g. `12L-12H-768D-RoPE-RMS-SwiGLU-PreNorm`."""
        heads = f"{self.n_heads}H" + (f"{self.n_kv_heads}KV" if self.n_kv_heads != self.n_heads else "")
        scaling = f"-{self.rope_scaling.rope_type}" if self.rope_scaling else ""
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
            if (self.ffn_type, self.activation) == ("swiglu", "silu")
            else (activation.get(self.activation, self.activation) + ("-GLU" if self.ffn_type == "swiglu" else ""))
        )
        return (
            f"{self.n_layers}L-{heads}-{self.d_model}D-{position.get(self.position_encoding, self.position_encoding)}"
            f"-{norm.get(self.normalization, self.normalization)}-{ffn}-{self.norm_position.title()}Norm"
            f"{'-QKNorm' if self.qk_norm else ''}{self._experts_name}"
        )

    @property
    def _experts_name(self) -> str:
        """Return the experts' part of the name: `-32E8x512+2048in3L`.

        Here 32 experts of 512 neurons, 8 per token, with a shared expert of 2,048, in 3 layers.
        """
        if self.moe is None:
            return ""
        width = f"x{self.moe.d_ff}" if self.moe.d_ff else ""
        shared = f"+{self.moe.shared_d_ff}" if self.moe.shared_d_ff else ""
        layers = "" if self.moe.layers is None else f"in{len(self.moe.layers)}L"
        return f"-{self.moe.n_experts}E{self.moe.top_k}{width}{shared}{layers}"
