"""What a run is: frozen, validated, saved beside its results. Unknown keys are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, Field, model_validator

from mlx_moe.architecture import COMPONENTS as COMPONENTS
from mlx_moe.architecture import ExpertsConfig, Frozen, ModelConfig
from mlx_moe.architecture import LoRAConfig as LoRAConfig
from mlx_moe.architecture import MoEConfig as MoEConfig
from mlx_moe.architecture import RopeScaling as RopeScaling


class DataConfig(Frozen):
    """Where the text comes from and how it becomes tokens."""

    source: str = "tinystories"  # `stories`, `tinystories`, or a path: .txt, .jsonl, .parquet, or a folder of them
    n_documents: int | None = Field(50_000, ge=1)  # at most so many; null: all
    text_field: str = "text"  # the column of JSONL and Parquet
    tokenizer: str = "gpt2"  # `char`, `bpe:VOCAB`, or a Hugging Face tokenizer by name or folder
    validation_fraction: float = Field(0.05, gt=0, lt=1)
    fit_vocabulary: bool = True  # the model takes the tokenizer's size; false where model.vocab_size was given


Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Frozen):
    """AdamW; or Muon for the matrices inside the blocks, with AdamW for the rest. Decay on matrices only."""

    name: Literal["adamw", "muon"] = "adamw"
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    momentum: Beta = 0.95  # of Muon
    weight_decay: float = Field(0.1, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    transfer: Literal["carry", "reset"] = "carry"  # what becomes of the moments at a boundary


class EngineConfig(Frozen):
    """How a step is computed. Up to rounding, what it computes does not depend on this."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    accumulation_steps: int = Field(1, ge=1)  # parts of a batch that go through the model one after the other
    activation_checkpointing: bool = False  # keep only each block's input for the backward pass
    compile: bool = False  # torch.compile; MLX always compiles
    strategy: Literal["ddp", "zero1", "fsdp"] = "ddp"  # what several processes share out


class PhaseConfig(Frozen):
    """Phase 1, and what every phase has: its length and its learning rate."""

    steps: int = Field(1000, ge=1)
    learning_rate: float = Field(3e-4, gt=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = Field(0, ge=0)
    final_lr_fraction: float = Field(0.1, ge=0, le=1)


class UpcyclePhaseConfig(PhaseConfig, ExpertsConfig):
    """Phase 2: FFNs become experts. What model that makes of a dense one, `transfer.experts.experts_of` says."""

    learning_rate: float = Field(1e-4, gt=0)
    every: int = Field(1, ge=1)  # layers: those of which (i + 1) is a multiple get experts
    granularity: int = Field(1, ge=1)  # each of n_experts, and of top_k, becomes so many experts of its neurons
    shared: bool = False  # one more expert for every token
    router_init: Literal["random", "zero", "centroids"] = "random"  # centroids: of what the routers would read
    router_std: float = Field(0.02, gt=0)
    noise: float = Field(0.0, ge=0)  # on the copies, relative to each tensor's standard deviation
    drop: float = Field(0.0, ge=0, le=1)  # the share of its neurons that each expert draws anew


class GrowPhaseConfig(PhaseConfig):
    """Phase 3: wider and deeper at once. What is left out follows from the model (`transfer.growth.usual_size`)."""

    learning_rate: float = Field(8e-5, gt=0)
    d_model: int | None = Field(None, ge=2)
    n_layers: int | None = Field(None, ge=1)
    n_heads: int | None = Field(None, ge=1)
    d_ff: int | None = Field(None, ge=1)
    split: Literal["uneven", "even"] = "uneven"


class PhasesConfig(Frozen):
    dense: PhaseConfig = PhaseConfig()
    moe: UpcyclePhaseConfig = UpcyclePhaseConfig()
    large_moe: GrowPhaseConfig = GrowPhaseConfig()


class TrainingConfig(Frozen):
    """Batches, and how often to look, measure and save (in steps)."""

    batch_size: int = Field(8, ge=1)
    log_every: int = Field(50, ge=1)
    eval_every: int = Field(250, ge=1)
    eval_sequences: int = Field(64, ge=1)
    checkpoint_every: int = Field(500, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    tracker: Literal["none", "trackio", "wandb"] = "none"  # gets the rows of metrics.jsonl too


class VerificationConfig(Frozen):
    """What a boundary must satisfy before the next phase starts."""

    probe_sequences: int = Field(8, ge=1)
    max_logit_difference: float = Field(1e-4, gt=0)
    max_loss_jump: float = Field(1e-3, gt=0)


class StartConfig(Frozen):
    """The model that a run starts from, where that is one there already (`mlxmoe train --from`)."""

    model: str  # a checkpoint, or a Hugging Face folder
    phases: tuple[int, ...]  # of 1, 2 and 3, those to run
    lineage: tuple[str, ...] = ()  # what the model is, and what became of it so far


class RunConfig(Frozen):
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
