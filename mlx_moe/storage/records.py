"""Schemas of the project's own files; a file is checked against its schema once, where it is read.

Unknown keys are kept, so that later versions may add some. Types are strict: a number in quotes is not a number.

L layers, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sized
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from mlx_moe.errors import InputError
from mlx_moe.limits import MAX_PHASES
from mlx_moe.storage.reading import LARGEST_CONFIG, read_json
from mlx_moe.validation import validate

Record = TypeVar("Record")

LARGEST_FIGURE = 1e39  # float32 ends at 3.4e38
LONGEST_FAULT = 150  # characters of a message, which quotes its input
LARGEST_EXPERTS = 1 << 30  # bytes of experts.json: two E × E maps for every layer of every checkpoint


def _missing_unless_finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


PhaseNumber = Annotated[int, Field(ge=1, le=MAX_PHASES)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Figure = Annotated[float, Field(ge=-LARGEST_FIGURE, le=LARGEST_FIGURE)]
Amount = Annotated[float, Field(ge=0, le=LARGEST_FIGURE)]
Milliseconds = Annotated[float, Field(ge=0, le=1e12)]  # of a step: at most thirty years
Share = Annotated[float, Field(ge=0, le=1)]
# In a log, a non-finite value counts as missing; the row is kept.
LoggedFigure = Annotated[Figure | None, BeforeValidator(_missing_unless_finite)]
LoggedAmount = Annotated[Amount | None, BeforeValidator(_missing_unless_finite)]
LoggedShare = Annotated[Share | None, BeforeValidator(_missing_unless_finite)]


class Open(BaseModel):
    """Base model that keeps unknown keys."""

    # Build schemas on first use, so that commands that read no such file start sooner.
    model_config = ConfigDict(extra="allow", allow_inf_nan=False, frozen=True, strict=True, defer_build=True)


class SplitRecord(Open):
    documents: Count
    tokens: Count
    bytes: Count
    sha256: str


class SourceRecord(Open):
    identity: str
    description: str
    licence: str | None = None


class TokenizerRecord(Open):
    spec: str
    identity: str
    vocab_size: Annotated[int, Field(ge=1, lt=2**32)]


class Provenance(Open):
    """`data.json` of a run, and `meta.json` of the token cache."""

    source: SourceRecord
    tokenizer: TokenizerRecord
    validation_fraction: Share
    split: Literal["by document", "by token"]
    dtype: Literal["uint16", "uint32"]
    train: SplitRecord
    validation: SplitRecord


class Environment(Open):
    """`environment.json` of a run."""

    command: list[str]
    git_sha: str | None
    python: str
    platform: str
    libraries: dict[str, str | None]
    backend: str
    backend_reason: str
    device: str
    precision: str


class MetricsRow(Open):
    """A row of `metrics.jsonl`. A row of step 0 has only a validation loss."""

    phase: PhaseNumber
    step: Count
    loss: LoggedFigure = None
    cross_entropy: LoggedFigure = None
    auxiliary_loss: LoggedFigure = None
    learning_rate: LoggedAmount = None
    grad_norm: LoggedAmount = None
    tokens: Count = 0
    tokens_per_s: LoggedAmount = None
    step_ms: Annotated[Milliseconds | None, BeforeValidator(_missing_unless_finite)] = None
    mfu: LoggedAmount = None
    peak_memory_bytes: Count | None = None
    validation_loss: LoggedFigure = None
    expert_load: list[list[LoggedShare]] | None = None  # (L, E), the layers with experts only
    load_imbalance: LoggedAmount = None
    router_entropy: list[LoggedAmount] | None = None  # (L,)


class Parameters(Open):
    total: Count
    active_per_token: Count


class PhaseRow(Open):
    """A row of `history.jsonl` for a finished phase."""

    event: Literal["phase"]
    phase: PhaseNumber
    step: Count
    first_loss: Figure | None
    last_loss: Figure | None
    first_validation_loss: Figure | None
    last_validation_loss: Figure | None
    tokens: Count
    seconds: Amount
    parameters: Parameters
    samples: dict[str, str]


class BoundaryRecord(Open):
    """A file of `boundaries/`, and a row of `history.jsonl`. None replaces non-finite values."""

    passed: bool
    logit_differences: list[Figure | None]
    max_logit_difference: Figure | None
    limit_logit_difference: Figure
    loss_before: Figure | None
    loss_after: Figure | None
    loss_jump: Figure | None
    limit_loss_jump: Figure
    argmax_agreement: Share | None
    routing_flips: Count = 0
    router_difference: Figure | None = None
    free_logit_difference: Figure | None = None
    rounding_floor: Figure | None = None
    allowed_lossy: bool = False


class BoundaryRow(BoundaryRecord):
    """A row of `history.jsonl` for a boundary that was crossed."""

    event: Literal["boundary"]
    phase: PhaseNumber


class DivergedRow(Open):
    """A row of `history.jsonl` for a phase that ended with a non-finite value; `reason` names it."""

    event: Literal["diverged"]
    phase: PhaseNumber
    step: Count
    reason: str


def _event(values: Any) -> str:
    return str(values.get("event") if isinstance(values, dict) else getattr(values, "event", ""))


HistoryRow = Annotated[
    Annotated[PhaseRow, Tag("phase")]
    | Annotated[BoundaryRow, Tag("boundary")]
    | Annotated[DivergedRow, Tag("diverged")],
    Discriminator(_event),
]


class TakenTokenRecord(Open):
    text: str
    occurrences: Count
    share: Share
    lift: Amount


class ClonesRecord(Open):
    neurons: Count
    neuron_distance: list[Amount] | None = None
    twin_neurons: Count | None = None
    copy_of: Count | None = None
    same_experts: Share | None = None


class LayerRecord(Open):
    """Statistics of one layer's experts."""

    layer: Count
    load: list[Share]  # (E,)
    entropy: Figure
    together: list[list[Share]]  # (E, E)
    distance: list[list[Amount]]  # (E, E)
    dead: list[Count]
    twins: list[list[Count]]
    tokens: list[list[TakenTokenRecord]]  # of each expert
    clones: ClonesRecord | None = None

    @model_validator(mode="after")
    def _experts_agree(self) -> LayerRecord:
        n_experts = len(self.load)
        rows: list[Sized] = [self.together, self.distance, self.tokens, *self.together, *self.distance]
        lengths = {len(row) for row in rows}
        if not n_experts or lengths != {n_experts}:
            raise ValueError(f"load is that of {n_experts} experts, and the rest is not")
        return self


class CheckpointRecord(Open):
    checkpoint: str
    phase: PhaseNumber
    step: Count
    layers: Annotated[list[LayerRecord], Field(min_length=1)]

    @model_validator(mode="after")
    def _layers_agree(self) -> CheckpointRecord:
        if len({len(layer.load) for layer in self.layers}) > 1:
            raise ValueError("the layers have different numbers of experts")
        return self


class ExpertsRecord(Open):
    """`experts.json` of a run."""

    tokens: Count
    twin_distance: Amount
    checkpoints: list[CheckpointRecord]


def read_record(kind: type[Record], file: Path, at_most: int = LARGEST_CONFIG) -> Record:
    """Read one of the project's JSON files, at most `at_most` bytes, and check it against its schema.

    Raises InputError naming the file and the faults.
    """
    values = read_json(file, at_most)
    try:
        return validate(kind, values)
    except InputError as error:
        faults = [fault[:LONGEST_FAULT] for fault in error.lines[:3]]
        raise InputError(f"cannot read {file}: {'; '.join(faults)}") from None


class SweepRun(Open):
    """A run in `sweep.json`: its value on each axis, and its config, which is checked when it starts."""

    choices: dict[str, Any]
    n_phases: PhaseNumber = 1
    config: dict[str, Any] = {}


class FailureRecord(Open):
    """`failure.json` of a sweep's run."""

    reason: str
    exit_code: int


class ResultRow(Open):
    """A row of a sweep's `results.jsonl`; counts and loss are present once the run has finished."""

    run: str
    status: Literal["finished", "failed", "interrupted", "not begun", "running elsewhere"]
    parameters_total: Count | None = None
    parameters_active: Count | None = None
    parameters_non_embedding: Count | None = None
    tokens: Count | None = None
    validation_loss: float | None = None


# Bounds of a fitted law: larger values are no constants of a loss, and their sums overflow.
Constant = Annotated[float, Field(ge=0, le=1e100)]
Size = Annotated[float, Field(ge=1, le=1e18)]  # parameters or tokens
Loss = Annotated[float, Field(ge=1e-9, le=1e9)]  # nats per token


class EstimateRecord(Open):
    value: Constant
    low: Constant
    high: Constant


class PointRecord(Open):
    n: Size
    d: Size
    loss: Loss
    run: str
    predicted: Constant


class FitRecord(Open):
    """A law in `fits.json`."""

    law: Literal["N", "D", "ND"]
    constants: dict[str, EstimateRecord]
    optimal_exponent: EstimateRecord | None
    level: Annotated[float, Field(gt=0, lt=1)]
    r_squared: Annotated[float, Field(le=1)]
    leave_one_out_error: Annotated[float, Field(ge=0)] | None
    degrees_of_freedom: Annotated[int, Field(ge=1, lt=2**31)]
    points: Annotated[list[PointRecord], Field(min_length=1)]
    draws: Annotated[list[list[Constant]], Field(min_length=1)]


class FitsRecord(Open):
    """`fits.json`, as `mlxmoe fit` writes it."""

    parameters: Literal["non_embedding", "active", "total"]
    fits: Annotated[list[FitRecord], Field(min_length=1)]
