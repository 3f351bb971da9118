"""The config of a run: frozen, validated, saved beside its results. Unknown keys are refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, Discriminator, Field, Tag, model_validator

from mlx_moe.architecture import COMPONENTS as COMPONENTS
from mlx_moe.architecture import (
    BelowOne,
    ExpertsConfig,
    Fraction,
    Frozen,
    ModelConfig,
    NotNegative,
    Positive,
    Real,
    Text,
    Whole,
)
from mlx_moe.architecture import LoRAConfig as LoRAConfig
from mlx_moe.architecture import MoEConfig as MoEConfig
from mlx_moe.architecture import RopeScaling as RopeScaling
from mlx_moe.errors import quoted
from mlx_moe.limits import (
    MAX_BATCH_SIZE,
    MAX_D_FF,
    MAX_D_MODEL,
    MAX_DOCUMENTS,
    MAX_EXPERTS,
    MAX_HEADS,
    MAX_LAYERS,
    MAX_NAME_BYTES,
    MAX_PHASES,
    MAX_SEED,
    MAX_STEPS,
)
from mlx_moe.terminal import printable
from mlx_moe.validation import tag


def _folder_name(name: str) -> str:
    remedy = "take a plain word"
    if name != name.strip() or not name:
        raise ValueError(f"is empty, or begins or ends with a blank; {remedy}")
    if name[0] in "-." or set("/\\\n\t") & set(name):
        raise ValueError(f"names a folder, so it must not begin with - or ., nor hold a slash or a line end; {remedy}")
    if printable(name) != name:
        raise ValueError(f"holds control characters; {remedy}")
    if len(name.encode()) > MAX_NAME_BYTES:
        raise ValueError(f"has {len(name.encode())} bytes; must be at most {MAX_NAME_BYTES}")
    return name


# A folder's name that stays inside its parent and that every shell and terminal displays unchanged.
FolderName = Annotated[str, AfterValidator(_folder_name)]


class DataConfig(Frozen):
    """Source of the text, and its tokenizer."""

    source: Text = "tinystories"  # `stories`, `tinystories`, or a path: .txt, .jsonl, .parquet, or a folder of them
    n_documents: Whole | None = Field(50_000, ge=1, le=MAX_DOCUMENTS)  # upper bound; null: all
    text_field: Text = "text"  # column in JSONL and Parquet
    tokenizer: Text = "gpt2"  # `char`, `bpe:VOCAB`, or a Hugging Face tokenizer by name or folder
    validation_fraction: Real = Field(0.05, gt=0, lt=1)
    fit_vocabulary: bool = True  # the vocabulary is the tokenizer's; false if model.vocab_size was given


class OptimizerConfig(Frozen):
    """AdamW; or Muon for the matrices inside the blocks and AdamW for the rest. Only matrices decay."""

    name: Literal["adamw", "muon"] = "adamw"
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.95)
    eps: Positive = 1e-8
    momentum: BelowOne = 0.95  # of Muon
    weight_decay: NotNegative = 0.1
    max_grad_norm: Positive = 1.0
    transfer: Literal["carry", "reset"] = "carry"  # what happens to the moments at a boundary


class EngineConfig(Frozen):
    """Settings of how a step is computed; up to rounding, results do not depend on them."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    accumulation_steps: Whole = Field(
        1, ge=1, le=MAX_BATCH_SIZE
    )  # parts of a batch that go through the model one after the other
    activation_checkpointing: bool = False  # keep only each block's input for the backward pass
    compile: bool = False  # torch.compile; MLX always compiles
    strategy: Literal["ddp", "zero1", "fsdp"] = "ddp"  # how several processes divide the work


class PhaseConfig(Frozen):
    """Training settings of a phase: its length and its learning rate."""

    steps: Whole = Field(1000, ge=1, le=MAX_STEPS)
    learning_rate: Positive = 3e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: Whole = Field(0, ge=0, le=MAX_STEPS)
    final_lr_fraction: Fraction = 0.1


class TrainPhaseConfig(PhaseConfig):
    """A phase that trains the model as it is: the first one."""

    transfer: None = None

    @model_validator(mode="before")
    @classmethod
    def _says_its_transfer(cls, values: Any) -> Any:
        for kind in (UpcyclePhaseConfig, GrowPhaseConfig) if isinstance(values, dict) else ():
            if alien := [key for key in values if key in kind.model_fields and key not in cls.model_fields]:
                transfer = kind.model_fields["transfer"].default
                raise ValueError(f"{alien[0]} belongs to a phase with transfer: {transfer}; name that, or leave it out")
        return values


class UpcyclePhaseConfig(PhaseConfig, ExpertsConfig):
    """A phase that turns a dense model's FFNs into experts, then trains.

    `transfer.moe_layout.experts_of` derives the model.
    """

    transfer: Literal["upcycle"] = "upcycle"
    learning_rate: Positive = 1e-4
    every: Whole = Field(1, ge=1, le=MAX_LAYERS)  # every n-th layer gets experts: layers where (i + 1) is a multiple
    granularity: Whole = Field(1, ge=1, le=MAX_EXPERTS)  # splits each expert into this many; top_k grows alike
    shared: bool = False  # adds an expert that every token visits
    router_init: Literal["random", "zero", "centroids"] = "random"  # centroids: k-means of the routers' inputs
    router_std: Positive = 0.02
    noise: NotNegative = 0.0  # on the copies, relative to each tensor's standard deviation
    drop: Fraction = 0.0  # fraction of its neurons that each expert draws anew

    @model_validator(mode="after")
    def _parts_are_few(self) -> UpcyclePhaseConfig:
        if self.n_experts * self.granularity > MAX_EXPERTS:
            raise ValueError(
                f"n_experts {self.n_experts} in {self.granularity} parts each (granularity): must be at most "
                f"{MAX_EXPERTS} experts in all; lower granularity"
            )
        return self


class GrowPhaseConfig(PhaseConfig):
    """A phase that makes the model wider and deeper, then trains.

    `transfer.growth.usual_size` fills in the sizes that are omitted.
    """

    transfer: Literal["grow"] = "grow"
    learning_rate: Positive = 8e-5
    d_model: Whole | None = Field(None, ge=2, le=MAX_D_MODEL)
    n_layers: Whole | None = Field(None, ge=1, le=MAX_LAYERS)
    n_heads: Whole | None = Field(None, ge=1, le=MAX_HEADS)
    d_ff: Whole | None = Field(None, ge=1, le=MAX_D_FF)
    split: Literal["uneven", "even"] = "uneven"


def _transfer_tag(values: Any) -> str:
    """Return the tag by which pydantic selects a phase's model: its transfer, or `none`."""
    transfer = values.get("transfer") if isinstance(values, dict) else getattr(values, "transfer", None)
    return tag(str(transfer).lower() if transfer is None else str(transfer))


AnyPhaseConfig = Annotated[
    Annotated[TrainPhaseConfig, Tag(tag("none"))]
    | Annotated[UpcyclePhaseConfig, Tag(tag("upcycle"))]
    | Annotated[GrowPhaseConfig, Tag(tag("grow"))],
    Discriminator(
        _transfer_tag,
        custom_error_type="transfer",
        custom_error_message="transfer must be upcycle or grow; leave it out in the first phase",
    ),
]


def _phase_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,39}", name):
        raise ValueError("must begin with a letter and have at most 40 letters, digits and underscores")
    return name


# A phase's name is part of a folder's name and of a key path.
PhaseName = Annotated[str, AfterValidator(_phase_name)]


def _three_phases() -> dict[str, AnyPhaseConfig]:
    return {"dense": TrainPhaseConfig(), "moe": UpcyclePhaseConfig(), "large_moe": GrowPhaseConfig()}


class TrainingConfig(Frozen):
    """Batch size, and the intervals (in steps) of logging, evaluation and checkpoints."""

    batch_size: Whole = Field(8, ge=1, le=MAX_BATCH_SIZE)
    log_every: Whole = Field(50, ge=1, le=MAX_STEPS)
    eval_every: Whole = Field(250, ge=1, le=MAX_STEPS)
    eval_sequences: Whole = Field(64, ge=1, le=MAX_BATCH_SIZE)
    checkpoint_every: Whole = Field(500, ge=1, le=MAX_STEPS)
    keep_checkpoints: Whole = Field(2, ge=1, le=MAX_STEPS)
    tracker: Literal["none", "trackio", "wandb"] = "none"  # also receives the rows of metrics.jsonl


class VerificationConfig(Frozen):
    """Limits that a boundary must satisfy before the next phase starts."""

    probe_sequences: Whole = Field(8, ge=1, le=MAX_BATCH_SIZE)
    max_logit_difference: Positive = 1e-4
    max_loss_jump: Positive = 1e-3


def _in_a_row(phases: tuple[int, ...]) -> tuple[int, ...]:
    if not phases or phases[0] < 1 or phases != tuple(range(phases[0], phases[-1] + 1)):
        raise ValueError("must be one or more numbers of phases in a row, as [2, 3]")
    return phases


class StartConfig(Frozen):
    """An existing model that a run starts from (`mlxmoe train --from`)."""

    model: Text  # a checkpoint, or a Hugging Face folder
    phases: Annotated[tuple[Whole, ...], Field(max_length=MAX_PHASES), AfterValidator(_in_a_row)]  # phases to run
    lineage: tuple[str, ...] = ()  # the model's origin and the steps that led to it


class RunConfig(Frozen):
    name: FolderName = "three-phase"
    seed: Whole = Field(0, ge=0, lt=MAX_SEED + 1)
    start: StartConfig | None = None  # None: newly initialised weights
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    lora: LoRAConfig = LoRAConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    engine: EngineConfig = EngineConfig()
    phases: dict[PhaseName, AnyPhaseConfig] = Field(
        default_factory=_three_phases, min_length=1, max_length=MAX_PHASES
    )  # in order of execution
    training: TrainingConfig = TrainingConfig()
    verification: VerificationConfig = VerificationConfig()

    @property
    def first_phase(self) -> int:
        return self.start.phases[0] if self.start else 1

    @property
    def last_phase(self) -> int:
        """Number of the last phase, unless the user names another."""
        return self.start.phases[-1] if self.start else len(self.phases)

    @model_validator(mode="after")
    def _sections_fit_together(self) -> RunConfig:
        self._check_phases()
        if self.model.lora is not None:
            raise ValueError("model.lora: set lora.rank and the rest beside model, not in it")
        if self.lora.rank and self.start is None:
            raise ValueError(f"lora.rank {self.lora.rank}: adapters need a model to adapt; name one with --from")
        missing = set() if self.model.ffn_type == "swiglu" else {"gate_proj"}
        if self.lora.rank and not set(self.lora.targets) - missing:
            raise ValueError(
                f"lora.targets {quoted(list(self.lora.targets))}: the model has none of these, so that nothing would "
                "be trained; take q_proj, v_proj or others"
            )
        batch_size, parts = self.training.batch_size, self.engine.accumulation_steps
        if batch_size % parts:
            raise ValueError(
                f"training.batch_size {batch_size} does not come in {parts} equal parts (engine.accumulation_steps); "
                f"take batch_size {-(-batch_size // parts) * parts}"
            )
        return self

    def _check_phases(self) -> None:
        names = list(self.phases)
        for name in names[1:]:
            if self.phases[name].transfer is None:
                raise ValueError(
                    f"phases.{name}: only the first phase has no transfer; set phases.{name}.transfer to upcycle or "
                    f"grow, or drop the phase with phases.{name}=null"
                )
        first = self.phases[names[0]].transfer
        if first is not None and self.start is None:
            raise ValueError(
                f"phases.{names[0]}.transfer {first}: the first phase has no model before it; name one with --from, or "
                "leave the transfer out"
            )
        if self.start is not None and self.start.phases[-1] > len(names):
            last = self.start.phases[-1]
            raise ValueError(f"start.phases: there is no phase {last}; the run has {len(names)}: {', '.join(names)}")


def save(config: BaseModel, path: Path) -> None:
    """Write a config as YAML or JSON, by the file's suffix; `read_mapping` and `validate` read it back."""
    values = config.model_dump(mode="json")
    text = json.dumps(values, indent=2) + "\n" if path.suffix == ".json" else yaml.safe_dump(values, sort_keys=False)
    path.write_text(text, encoding="utf-8")
