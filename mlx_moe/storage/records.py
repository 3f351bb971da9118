"""What each file of ours holds, as types: a file is checked against its type where it is read, and nowhere else.

Keys that are not named here are let through, so that a later version may add some.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from mlx_moe.errors import InputError
from mlx_moe.storage.reading import read_json
from mlx_moe.validation import validate

Record = TypeVar("Record")
Phase = Annotated[int, Field(ge=1, le=3)]
Count = Annotated[int, Field(ge=0, lt=2**63)]


class Open(BaseModel):
    """Keys beyond those named are kept as they are."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False, frozen=True)


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
    validation_fraction: float
    split: Literal["by document", "by token"]
    dtype: Literal["uint16", "uint32"]
    train: SplitRecord
    validation: SplitRecord


class MetricsRow(Open):
    """A row of `metrics.jsonl`. A row of step 0 has a validation loss only."""

    phase: Phase
    step: Count
    loss: float | None = None
    cross_entropy: float | None = None
    auxiliary_loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens: Count = 0
    tokens_per_s: float | None = None
    step_ms: Annotated[float, Field(ge=0)] = 0
    mfu: float | None = None
    peak_memory_bytes: Count | None = None
    validation_loss: float | None = None
    expert_load: list[list[float]] | None = None
    load_imbalance: float | None = None
    router_entropy: list[float] | None = None


class Parameters(Open):
    total: Count
    active_per_token: Count


class PhaseRow(Open):
    """A row of `history.jsonl` for a phase that is finished."""

    event: Literal["phase"]
    phase: Phase
    step: Count
    first_loss: float
    last_loss: float
    first_validation_loss: float
    last_validation_loss: float
    tokens: Count
    seconds: float
    parameters: Parameters
    samples: dict[str, str]


class Certificate(Open):
    """A file of `boundaries/`, and a row of `history.jsonl`. None stands for what is not finite."""

    passed: bool
    logit_differences: list[float | None]
    max_logit_difference: float | None
    limit_logit_difference: float
    loss_before: float | None
    loss_after: float | None
    loss_jump: float | None
    limit_loss_jump: float
    argmax_agreement: float | None
    routing_flips: Count = 0
    router_difference: float | None = None
    free_logit_difference: float | None = None
    rounding_floor: float | None = None
    allowed_lossy: bool = False


class BoundaryRow(Certificate):
    """A row of `history.jsonl` for a boundary that was crossed."""

    event: Literal["boundary"]
    phase: Phase


def _event(values: Any) -> str:
    return str(values.get("event") if isinstance(values, dict) else getattr(values, "event", ""))


HistoryRow = Annotated[
    Annotated[PhaseRow, Tag("phase")] | Annotated[BoundaryRow, Tag("boundary")], Discriminator(_event)
]


def read_record(kind: type[Record], file: Path) -> Record:
    """A JSON file of ours, checked against its type. Raises InputError, which names the file and what is wrong."""
    values = read_json(file)
    try:
        return validate(kind, values)
    except InputError as error:
        raise InputError(f"cannot read {file}: {'; '.join(str(error).splitlines()[:3])}") from None


class Exact(Open):
    """Numbers are numbers: `true` and `"3"` are none."""

    model_config = ConfigDict(strict=True)


class SweepRun(Exact):
    """A run in `sweep.json`: what it takes on each axis, and its config, which it is checked against when it starts."""

    choices: dict[str, Any]
    n_phases: Phase = 1
    config: dict[str, Any] = {}


class FailureRecord(Exact):
    """`failure.json` of a sweep's run."""

    reason: str
    exit_code: int


class ResultRow(Exact):
    """A row of a sweep's `results.jsonl`; the counts and the loss are there once the run has finished."""

    run: str
    status: Literal["finished", "failed", "interrupted", "not begun", "running elsewhere"]
    parameters_total: Count | None = None
    parameters_active: Count | None = None
    parameters_non_embedding: Count | None = None
    tokens: Count | None = None
    validation_loss: float | None = None


# Of a fitted law. Whatever lies beyond these is no constant of a loss, and sums of it overflow.
Constant = Annotated[float, Field(ge=0, le=1e100)]
Size = Annotated[float, Field(ge=1, le=1e18)]  # parameters or tokens
Loss = Annotated[float, Field(ge=1e-9, le=1e9)]  # nats per token


class EstimateRecord(Exact):
    value: Constant
    low: Constant
    high: Constant


class PointRecord(Exact):
    n: Size
    d: Size
    loss: Loss
    run: str
    predicted: Constant


class FitRecord(Exact):
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


class FitsRecord(Exact):
    """`fits.json`, as `mlxmoe fit` writes it."""

    parameters: Literal["non_embedding", "active", "total"]
    fits: Annotated[list[FitRecord], Field(min_length=1)]
