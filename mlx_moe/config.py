"""What a run is: frozen, validated, saved beside its results. Unknown keys are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from mlx_moe.display_name import display_name

# The names that the registries of both backends know. A new component is one function in each backend's `layers`
# or `attention`, and its name here.
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


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class MoEConfig(_Frozen):
    """The experts of every layer, and what keeps their load balanced."""

    n_experts: int = Field(8, ge=1)
    top_k: int = Field(2, ge=1)
    load_balance_coefficient: float = Field(0.01, ge=0)
    z_loss_coefficient: float = Field(0.001, ge=0)

    @model_validator(mode="after")
    def _top_k_fits(self) -> MoEConfig:
        if self.top_k > self.n_experts:
            raise ValueError(f"top_k {self.top_k} is more than n_experts {self.n_experts}; lower top_k")
        return self


class RopeScaling(_Frozen):
    """Slower rotations, for contexts beyond the original one.

    Those that turn less than `low_freq_factor` times in the original context slow down by `factor`, those that turn
    more than `high_freq_factor` times do not: Llama 3.1's. Without an original context all do: linear scaling.
    """

    factor: float = Field(ge=1)
    original_context_length: int = Field(0, ge=0)
    low_freq_factor: float = Field(1.0, gt=0)
    high_freq_factor: float = Field(4.0, gt=0)

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


class LoRAConfig(_Frozen):
    """Low-rank adapters beside frozen weights, W·x + alpha/rank · B·A·x (Hu et al. 2021); every expert has its own.

    On all projections, which it takes to reach full training (QLoRA, Dettmers et al. 2023); those of attention alone
    would leave upcycled experts the same for ever.
    """

    rank: int = Field(0, ge=0)  # 0: no adapters, all weights are trained
    alpha: float = Field(16.0, gt=0)
    targets: tuple[Projection, ...] = get_args(Projection)
    router: bool = True  # trained in full


def _default_d_ff(data: dict[str, Any]) -> int:
    """4 × d_model, or 8/3 × d_model in steps of 32 for the three matrices of SwiGLU (Shazeer 2020)."""
    d_model = data.get("d_model", 1)
    return 32 * max(1, round(d_model / 12)) if data.get("ffn_type") == "swiglu" else 4 * d_model


class ModelConfig(_Frozen):
    """One architecture. `n_kv_heads`, `head_dim`, `d_ff` and `attention_bias` follow from the rest when left out."""

    architecture: str = "simple"
    vocab_size: int = Field(50257, ge=2)
    context_length: int = Field(256, ge=2)
    d_model: int = Field(832, ge=2)
    n_layers: int = Field(7, ge=1)
    n_heads: int = Field(8, ge=1)
    n_kv_heads: int = Field(default_factory=lambda data: data.get("n_heads", 1), ge=1)
    head_dim: int = Field(default_factory=lambda data: max(1, data.get("d_model", 1) // data.get("n_heads", 1)), ge=1)
    normalization: _component("normalization") = "layernorm"  # type: ignore[valid-type]
    norm_eps: float = Field(1e-5, gt=0)
    norm_position: Literal["pre", "post"] = "pre"
    activation: _component("activation") = "gelu"  # type: ignore[valid-type]
    ffn_type: _component("ffn_type") = "standard"  # type: ignore[valid-type]
    d_ff: int = Field(default_factory=_default_d_ff, ge=1)
    position_encoding: _component("position_encoding") = "rope"  # type: ignore[valid-type]
    rope_theta: float = Field(10_000.0, gt=0)
    rope_scaling: RopeScaling | None = None
    qk_norm: bool = False  # RMSNorm over every head's queries and keys, before they are rotated (Qwen3)
    attention_backend: _component("attention_backend") = "sdpa"  # type: ignore[valid-type]
    bias: bool = True
    attention_bias: Literal["none", "qkv", "qkvo"] = Field(
        default_factory=lambda data: "qkvo" if data.get("bias", True) else "none"
    )
    weight_tying: bool = True
    dropout: float = Field(0.0, ge=0, lt=1)
    init_std: float = Field(0.02, gt=0)
    moe: MoEConfig | None = None
    lora: LoRAConfig | None = None  # while it is trained with adapters; a run says so in its own section

    def adapter(self, projection: str) -> LoRAConfig | None:
        return self.lora if self.lora and projection in self.lora.targets else None

    @model_validator(mode="after")
    def _shapes_fit(self) -> ModelConfig:
        if "head_dim" not in self.model_fields_set and self.d_model % self.n_heads:
            fitting = [n for n in range(1, self.d_model + 1) if self.d_model % n == 0]
            nearest = min(fitting, key=lambda n: abs(n - self.n_heads))
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
        return self

    @property
    def display_name(self) -> str:
        return display_name(self)


class DataConfig(_Frozen):
    """Where the text comes from and how it becomes tokens."""

    source: str = "tinystories"  # `stories`, `tinystories`, or a path: .txt, .jsonl, .parquet, or a folder of them
    n_documents: int | None = Field(50_000, ge=1)  # at most so many; null: all
    text_field: str = "text"  # the column of JSONL and Parquet
    tokenizer: str = "gpt2"  # `char`, `bpe:VOCAB`, or a Hugging Face tokenizer by name or folder
    validation_fraction: float = Field(0.05, gt=0, lt=1)
    fit_vocabulary: bool = True  # the model takes the tokenizer's size; false where model.vocab_size was given


Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(_Frozen):
    """AdamW; or Muon for the matrices inside the blocks, with AdamW for the rest. Decay on matrices only."""

    name: Literal["adamw", "muon"] = "adamw"
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    momentum: Beta = 0.95  # of Muon
    weight_decay: float = Field(0.1, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    transfer: Literal["carry", "reset"] = "carry"  # what becomes of the moments at a boundary


class EngineConfig(_Frozen):
    """How a step is computed. Up to rounding, what it computes does not depend on this."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    accumulation_steps: int = Field(1, ge=1)  # parts of a batch that go through the model one after the other
    activation_checkpointing: bool = False  # keep only each block's input for the backward pass
    compile: bool = False  # torch.compile; MLX always compiles
    strategy: Literal["ddp", "zero1", "fsdp"] = "ddp"  # what several processes share out


class PhaseConfig(_Frozen):
    """Phase 1, and what every phase has: its length and its learning rate."""

    steps: int = Field(1000, ge=1)
    learning_rate: float = Field(3e-4, gt=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = Field(0, ge=0)
    final_lr_fraction: float = Field(0.1, ge=0, le=1)


class UpcyclePhaseConfig(PhaseConfig, MoEConfig):
    """Phase 2: every FFN becomes experts."""

    learning_rate: float = Field(1e-4, gt=0)
    router_init: Literal["random", "zero"] = "random"
    router_std: float = Field(0.02, gt=0)
    noise: float = Field(0.0, ge=0)  # on the copies, relative to each tensor's standard deviation
    drop: float = Field(0.0, ge=0, le=1)  # the share of its neurons that each expert draws anew

    @property
    def moe(self) -> MoEConfig:
        return MoEConfig(**{name: getattr(self, name) for name in MoEConfig.model_fields})


class GrowPhaseConfig(PhaseConfig):
    """Phase 3: wider and deeper at once. What is left out follows from the model (`transfer.growth.usual_size`)."""

    learning_rate: float = Field(8e-5, gt=0)
    d_model: int | None = Field(None, ge=2)
    n_layers: int | None = Field(None, ge=1)
    n_heads: int | None = Field(None, ge=1)
    d_ff: int | None = Field(None, ge=1)
    split: Literal["uneven", "even"] = "uneven"


class PhasesConfig(_Frozen):
    dense: PhaseConfig = PhaseConfig()
    moe: UpcyclePhaseConfig = UpcyclePhaseConfig()
    large_moe: GrowPhaseConfig = GrowPhaseConfig()


class TrainingConfig(_Frozen):
    """Batches, and how often to look, measure and save (in steps)."""

    batch_size: int = Field(8, ge=1)
    log_every: int = Field(50, ge=1)
    eval_every: int = Field(250, ge=1)
    eval_sequences: int = Field(64, ge=1)
    checkpoint_every: int = Field(500, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    tracker: Literal["none", "trackio", "wandb"] = "none"  # gets the rows of metrics.jsonl too


class VerificationConfig(_Frozen):
    """What a boundary must satisfy before the next phase starts."""

    probe_sequences: int = Field(8, ge=1)
    max_logit_difference: float = Field(1e-4, gt=0)
    max_loss_jump: float = Field(1e-3, gt=0)


class StartConfig(_Frozen):
    """The model that a run starts from, where that is one there already (`mlxmoe train --from`)."""

    model: str  # a checkpoint, or a Hugging Face folder
    phases: tuple[int, ...]  # of 1, 2 and 3, those to run
    lineage: tuple[str, ...] = ()  # what the model is, and what became of it so far


class RunConfig(_Frozen):
    name: str = "three-phase"
    seed: int = Field(0, ge=0, lt=2**63)
    start: StartConfig | None = None  # None: weights drawn anew
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    lora: LoRAConfig = LoRAConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    engine: EngineConfig = EngineConfig()
    phases: PhasesConfig = PhasesConfig()
    training: TrainingConfig = TrainingConfig()
    verification: VerificationConfig = VerificationConfig()

    @property
    def first_phase(self) -> int:
        return self.start.phases[0] if self.start else 1

    @model_validator(mode="after")
    def _sections_fit_together(self) -> RunConfig:
        if self.model.lora is not None:
            raise ValueError("model.lora: set lora.rank and the rest beside model, not in it")
        if self.lora.rank and self.start is None:
            raise ValueError(f"lora.rank {self.lora.rank}: adapters need a model to adapt; name one with --from")
        batch_size, parts = self.training.batch_size, self.engine.accumulation_steps
        if batch_size % parts:
            raise ValueError(
                f"training.batch_size {batch_size} does not come in {parts} equal parts (engine.accumulation_steps); "
                f"take batch_size {-(-batch_size // parts) * parts}"
            )
        return self


def save(config: BaseModel, path: Path) -> None:
    """Write a config as YAML or JSON, by the file's ending; `read_mapping` and `validate` read it back."""
    values = config.model_dump(mode="json")
    text = json.dumps(values, indent=2) + "\n" if path.suffix == ".json" else yaml.safe_dump(values, sort_keys=False)
    path.write_text(text, encoding="utf-8")
