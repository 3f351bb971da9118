"""Typed results of a parity comparison, and their JSON. `terminal.py` and `page.py` render these results.

Names: `mlx` and `torch` are the two programs compared. In a library comparison they are mlx-lm and transformers.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from mlx_moe.storage.atomic import signature
from mlx_moe.training.environment import library_versions
from mlx_moe.transfer.certificate import Certificate
from parity.tolerances import TO_FLOAT32, TO_OTHER, TO_OTHER_IN_HALF, Tolerance

Json = dict[str, Any]
Array = NDArray[Any]
RouterChoice = tuple[Array, NDArray[np.int64]]  # the scores (N, E) by which a router chose, experts (N, K)

# module: a module fed the reference's input; model: router logits and logits of the whole model; decode: logits with a
# cache, in chunks, or row by row; train: a gradient, or a weight after a step of AdamW; half: a gradient with products
# in bfloat16 or float16.
Scope = Literal["module", "model", "decode", "train", "half"]
SCOPES: tuple[Scope, ...] = get_args(Scope)


@dataclass(frozen=True)
class ParityReport:
    """Everything that one `mlxmoe parity` command found, and how to repeat it."""

    command: str
    seed: int
    comparisons: tuple[ModelComparison, ...] = ()
    library: LibraryReport | None = None
    self_test: SelfTest | None = None
    python: str = field(default_factory=platform.python_version)
    platform: str = field(default_factory=platform.platform)
    libraries: dict[str, str | None] = field(default_factory=library_versions)

    @property
    def passed(self) -> bool | None:
        """Return the verdict; None where nothing could be judged."""
        return {0: True, 1: False, 2: None}[self.exit_code]

    @property
    def exit_code(self) -> int:
        """Return 0 where everything agrees, 1 where something differs, 2 where nothing could be judged."""
        codes = [self.library.exit_code] if self.library else []
        codes += [int(not comparison.passed) for comparison in self.comparisons]
        codes += [int(not self.self_test.passed)] if self.self_test else []
        return max(codes)

    def to_json(self) -> str:
        """Return all figures as indented JSON; null stands for numbers that are not finite."""
        document: Json = {"generator": signature("parity")}
        document |= {name: getattr(self, name) for name in ("command", "seed", "python", "platform", "libraries")}
        if self.library:
            document["model"] = self.library.to_json()
        if self.comparisons:
            document["limits_rmse_and_largest"] = {
                "ratio": _pair(TO_OTHER),
                "float32": _pair(TO_FLOAT32),
                "half": _pair(TO_OTHER_IN_HALF),
            }
            document["comparisons"] = [comparison.to_json() for comparison in self.comparisons]
        if self.self_test:
            document |= self.self_test.to_json()
        document["passed"] = self.passed
        return json.dumps(_finite(document), indent=2)


@dataclass(frozen=True)
class TensorError:
    """Error of a tensor against its reference. The largest error is at `place`: `found` instead of `expected`."""

    rmse: float
    largest: float
    place: tuple[int, ...] = ()
    found: float = 0.0
    expected: float = 0.0

    @staticmethod
    def between(found: Array, expected: Array) -> TensorError:
        """Return the error of `found`; infinite where its shape is wrong or a number is not finite."""
        if found.shape != expected.shape or not np.isfinite(found).all():
            return TensorError(np.inf, np.inf)
        distance = np.abs(found.astype(np.float64) - expected)
        place = tuple(int(i) for i in np.unravel_index(distance.argmax(), distance.shape))
        rmse, largest = float(np.sqrt(np.square(distance).mean())), float(distance[place])
        return TensorError(rmse, largest, place, float(found[place]), float(expected[place]))

    @staticmethod
    def worst(errors: Sequence[TensorError]) -> TensorError:
        """Return the largest RMSE and the largest error of several."""
        return TensorError(max(error.rmse for error in errors), max(error.largest for error in errors))

    def ratios_to(self, other: TensorError, least: TensorError) -> tuple[float, float]:
        """Return RMSE and largest error as multiples of the other's; both count as at least `least`."""
        return (
            _ratio(max(self.rmse, least.rmse), max(other.rmse, least.rmse)),
            _ratio(max(self.largest, least.largest), max(other.largest, least.largest)),
        )


@dataclass(frozen=True)
class TensorStatistics:
    """Shape and spread of a reference tensor."""

    shape: tuple[int, ...]
    mean: float
    std: float
    smallest: float
    largest: float

    @staticmethod
    def of(array: Array) -> TensorStatistics:
        """Return the statistics of a tensor with at least one element."""
        return TensorStatistics(
            array.shape, *(float(value) for value in (array.mean(), array.std(), array.min(), array.max()))
        )

    def __str__(self) -> str:
        return f"mean {self.mean:.2g}, std {self.std:.2g}, {self.smallest:.3g} to {self.largest:.3g}"


@dataclass(frozen=True)
class TensorVerdict:
    """Verdict on a tensor: both backends' errors, the errors they are judged by, and the faults found, in words."""

    name: str
    scope: Scope
    mlx: TensorError
    torch: TensorError
    floor: TensorError
    float32: TensorError
    statistics: TensorStatistics
    faults: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.faults

    @property
    def ratio_to_other(self) -> float:
        """Return the worse backend's RMSE as a multiple of the better one's, both at least plain float32's."""
        forth, back = self.mlx.ratios_to(self.torch, self.float32), self.torch.ratios_to(self.mlx, self.float32)
        return max(forth[0], back[0])

    @property
    def ratio_to_float32(self) -> float:
        """Return the worse backend's RMSE as a multiple of plain float32's, at least 1."""
        return max(error.ratios_to(self.float32, self.float32)[0] for error in (self.mlx, self.torch))

    def to_json(self) -> Json:
        return asdict(self) | {"passed": self.passed}


def tensors_by_scope(tensors: Iterable[TensorVerdict]) -> dict[Scope, list[TensorVerdict]]:
    """Return the tensors of every scope, in order; every known scope is a key.

    Raises ValueError for a scope that is not in `SCOPES`, so that a renderer cannot drop tensors silently.
    """
    groups: dict[Scope, list[TensorVerdict]] = {scope: [] for scope in SCOPES}
    for tensor in tensors:
        if tensor.scope not in groups:
            raise ValueError(f"{tensor.name} has the unknown scope {tensor.scope!r}; known: {', '.join(SCOPES)}")
        groups[tensor.scope].append(tensor)
    return groups


@dataclass(frozen=True)
class RoutingMargins:
    """Margins of a layer's router in the reference: router logit of the last expert chosen minus that of the next."""

    smallest: float  # exact ties left out
    median: float
    error: float  # the largest shift of the router logits in MLX plus the largest in PyTorch


@dataclass(frozen=True)
class BackendDifference:
    """Practical size of the difference between the backends. Reported, not judged."""

    kl: float  # KL divergence of torch's distribution from MLX's (nats per token, mean over tokens)
    top1_agreement: float  # fraction of positions with the same likeliest token
    loss_difference: float  # nats per token, MLX − torch
    max_logit_difference: float


@dataclass(frozen=True)
class ModelVerdict:
    """Both backends against the float64 reference of one model."""

    tensors: tuple[TensorVerdict, ...]  # modules in forward order, then router logits, logits, and the other scopes
    flips: int  # choices of other experts than the reference's, within the routers' measured errors
    routing_faults: tuple[str, ...]
    margins: tuple[RoutingMargins, ...]  # layer by layer
    impact: BackendDifference
    propagated: dict[str, tuple[TensorError, TensorError]]  # (MLX, torch) by module, earlier errors included
    generation_faults: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.routing_faults and not self.generation_faults and all(tensor.passed for tensor in self.tensors)

    @property
    def logits(self) -> TensorVerdict:
        return next(tensor for tensor in reversed(self.tensors) if tensor.scope == "model")

    @property
    def logits_ratio(self) -> float:
        """Return MLX's RMSE in the logits as a multiple of PyTorch's, both at least the floor."""
        return self.logits.mlx.ratios_to(self.logits.torch, self.logits.floor)[0]

    def first_place(self) -> str | None:
        """Return where the first fault is: a module, routing, generation, or the whole model; None without a fault."""
        first = self._first()
        if first is None:
            return "routing" if self.routing_faults else "generation" if self.generation_faults else None
        return f"the whole model ({first.name})" if first.scope == "model" else first.name

    def first_fault(self) -> str | None:
        """Return the first fault in words, with the reference's statistics there; None without a fault."""
        first, place = self._first(), self.first_place()
        if first is None:
            return f"{place}: {'; '.join(self.routing_faults or self.generation_faults)}" if place else None
        if first.scope == "model":
            place = f"{place}, although every single module is right"
        shape = "×".join(map(str, first.statistics.shape))
        return f"{place}: {'; '.join(first.faults)}. Reference there: shape {shape}, {first.statistics}"

    def _first(self) -> TensorVerdict | None:
        return next((tensor for tensor in self.tensors if not tensor.passed), None)

    def to_json(self) -> Json:
        return {
            "first_fault": self.first_fault(),
            "flips": self.flips,
            "routing_faults": self.routing_faults,
            "wrong_words": self.generation_faults,
            "routing_margins": [asdict(margin) for margin in self.margins],
            "impact": asdict(self.impact),
            "tensors": [tensor.to_json() for tensor in self.tensors],
            "propagated": {
                name: {"mlx": asdict(mlx), "torch": asdict(torch)} for name, (mlx, torch) in self.propagated.items()
            },
        }


@dataclass(frozen=True)
class TransferClaim:
    """A property that a transfer promises, with the error that remains of it and where that is largest."""

    name: str
    error: float
    limit: float
    where: str = ""

    @property
    def passed(self) -> bool:
        return self.error <= self.limit  # false for NaN

    def __str__(self) -> str:
        where = f", largest in {self.where}" if self.where else ""
        return f"{self.name}: error {self.error:.1e} (limit {self.limit:g}){where}"


@dataclass(frozen=True)
class ModelComparison:
    """Comparison of a model: both backends against the reference, and each across the boundary before this model.

    Where a reference would take too much memory, MLX is compared with PyTorch instead.
    """

    subject: str
    architecture: str
    verdict: ModelVerdict | None
    without_reference: str = ""  # the reason where there is no verdict
    backends: Certificate | None = None
    boundary_mlx: Certificate | None = None
    boundary_torch: Certificate | None = None
    claims: tuple[TransferClaim, ...] = ()  # of the transfer that made this model
    weights_sha256: str = ""

    @property
    def certificates(self) -> dict[str, Certificate]:
        """Return the certificates that exist, by field name."""
        named = {name: getattr(self, name) for name in ("backends", "boundary_mlx", "boundary_torch")}
        return {name: certificate for name, certificate in named.items() if certificate is not None}

    @property
    def passed(self) -> bool:
        judged = self.verdict is None or self.verdict.passed
        proofs: list[Certificate | TransferClaim] = [*self.certificates.values(), *self.claims]
        return judged and all(proof.passed for proof in proofs)

    @property
    def boundary_difference(self) -> float | None:
        """Return the largest logit difference of either backend across the boundary; None without a boundary."""
        found = [certificate for certificate in (self.boundary_mlx, self.boundary_torch) if certificate]
        return max((certificate.max_logit_difference for certificate in found), default=None)

    @property
    def has_boundary_ties(self) -> bool:
        """Return whether rounding decided a tie of experts at the boundary."""
        return any(certificate.routing_flips for certificate in (self.boundary_mlx, self.boundary_torch) if certificate)

    def to_json(self) -> Json:
        found: Json = {"subject": self.subject, "architecture": self.architecture, "passed": self.passed}
        found |= self.verdict.to_json() if self.verdict else {"without_truth": self.without_reference}
        found["weights_sha256"] = self.weights_sha256
        found["claims"] = [asdict(claim) | {"passed": claim.passed} for claim in self.claims]
        return found | {name: certificate.to_json() for name, certificate in self.certificates.items()}


def agreement(comparisons: Sequence[ModelComparison]) -> str:
    """Return the verdict on one or more models in words: "24 of 24 models agree"."""
    agreeing, n = sum(comparison.passed for comparison in comparisons), len(comparisons)
    return f"{agreeing} of {n} {'model agrees' if n == 1 else 'models agree'}"


@dataclass(frozen=True)
class LibraryTensorVerdict:
    """Error of mlx-lm in one tensor, judged by that of transformers in float32."""

    name: str
    mlx: TensorError
    torch: TensorError
    floor: TensorError
    statistics: TensorStatistics
    slack: float = 1.0
    propagated: tuple[TensorError, TensorError] | None = None  # (mlx-lm, transformers), earlier errors included
    is_followed: bool = True  # whether modules after it are wrong, too

    @property
    def ratios(self) -> tuple[float, float]:
        """Return RMSE and largest error as multiples of transformers', both at least the floor."""
        return self.mlx.ratios_to(self.torch, self.floor)

    @property
    def passed(self) -> bool:
        return TO_OTHER.widened(self.slack).allows(self.ratios)

    def __str__(self) -> str:
        return f"{self.name}: {self.figures}"

    @property
    def figures(self) -> str:
        """Return errors, ratios, limits and the reference's statistics in words."""
        (rmse, largest), limits = self.ratios, TO_OTHER.widened(self.slack)
        return (
            f"mlx-lm's error is {rmse:.3g} times that of transformers (RMSE {self.mlx.rmse:.1e} against "
            f"{self.torch.rmse:.1e}; limit {limits.rmse:g}), the largest {largest:.3g} times (limit "
            f"{limits.largest:g}). Reference there: {self.statistics}"
        )

    def to_json(self) -> Json:
        return asdict(self) | {"ratios": self.ratios, "passed": self.passed}


@dataclass(frozen=True)
class LibraryMeasurement:
    """Errors of mlx-lm on one set of tokens."""

    logits_BTV: Array  # with mlx-lm's own choices of experts
    ways: tuple[LibraryTensorVerdict, ...]  # logits, by the way the model was run
    modules: tuple[LibraryTensorVerdict, ...]  # in the order they finish, each fed the reference's input
    kl: float  # KL divergence of mlx-lm's distribution from the reference (nats per token)
    top1_agreement: float  # fraction of positions with the same likeliest token
    wrong_tokens: int  # generated greedily, not explained by rounding
    remarks: tuple[str, ...]
    judged: int  # positions
    flips: int = 0  # choices of other experts that tie up to rounding
    misrouted: int = 0  # choices of other experts that do not tie

    @property
    def passed(self) -> bool:
        return not self.wrong_tokens and not self.misrouted and all(way.passed for way in self.ways)

    @property
    def first_module(self) -> LibraryTensorVerdict | None:
        """Return the first module that is wrong by itself; None if there is none.

        A module with a correct parent does not count, nor one followed by correct modules: libraries may use one name
        for different things.
        """
        names = {module.name for module in self.modules}
        failed = {module.name for module in self.modules if not module.passed and module.is_followed}
        return next(
            (
                module
                for module in self.modules
                if module.name in failed
                and all(parent in failed for parent in _parents(module.name) if parent in names)
            ),
            None,
        )

    def to_json(self) -> Json:
        first = self.first_module
        return {
            "kl": self.kl,
            "top1_agreement": self.top1_agreement,
            "wrong_tokens": self.wrong_tokens,
            "remarks": self.remarks,
            "positions_judged": self.judged,
            "flips": self.flips,
            "misrouted": self.misrouted,
            "first_module": first.name if first else None,
            "ways": [way.to_json() for way in self.ways],
            "modules": [module.to_json() for module in self.modules],
        }


@dataclass(frozen=True)
class KeyUsage:
    """A key of config.json (dotted) that only one of the libraries uses."""

    key: str
    value: Any
    used_by: str
    ignored_by: str

    @property
    def assignment(self) -> str:
        return f"{self.key} = {json.dumps(self.value)}"


@dataclass(frozen=True)
class LibraryReport:
    """Comparison of mlx-lm with transformers on one Hugging Face folder."""

    folder: str
    model_type: str
    n_parameters: int
    config_sha256: str
    weights_sha256: dict[str, str]
    problem: str = ""  # the reason where nothing was judged
    measured: LibraryMeasurement | None = None
    margins: tuple[float, ...] = ()  # the smallest routing margin of every layer with experts
    key_usage: tuple[KeyUsage, ...] = ()
    parameters: tuple[str, ...] = ()  # tensors that one library drops or initializes at random
    causes: tuple[str, ...] = ()
    repair: str = ""  # what to add to config.json

    @property
    def passed(self) -> bool | None:
        """Return the verdict; None where nothing was judged."""
        return None if self.problem or self.measured is None else self.measured.passed and not self.parameters

    @property
    def exit_code(self) -> int:
        return {True: 0, False: 1, None: 2}[self.passed]

    def remarks(self) -> Iterator[str]:
        """Yield what failed, the causes found, how to repair it, and the keys that one library ignores."""
        measured = self.measured
        if self.problem:
            yield self.problem
        if measured:
            yield from measured.remarks
            if measured.misrouted:
                yield f"routing: {measured.misrouted} choices of experts differ from the reference's beyond rounding"
            if measured.wrong_tokens:
                yield f"greedy generation: {measured.wrong_tokens} tokens differ from the reference's beyond rounding"
            if measured.first_module and not measured.passed:
                yield f"first in {measured.first_module}"
        yield from (f"tensor {remark}" for remark in self.parameters)
        if self.causes:
            yield from (f"cause: {cause}" for cause in self.causes)
        elif self.passed is False:
            yield "cause: no single key of config.json explains it"
        if self.repair:
            yield self.repair
        harmless = ", without effect here" if self.passed or self.causes else ""
        unexplained = [
            usage for usage in self.key_usage if not any(cause.startswith(usage.assignment) for cause in self.causes)
        ]
        for name in ("mlx-lm", "transformers"):
            if keys := ", ".join(usage.assignment for usage in unexplained if usage.ignored_by == name):
                yield f"only {name} ignores{harmless}: {keys}"

    def to_json(self) -> Json:
        found: Json = {
            "folder": self.folder,
            "model_type": self.model_type,
            "parameters": self.n_parameters,
            "passed": self.passed,
            "problem": self.problem,
            "causes": self.causes,
            "repair": self.repair,
            "keys_that_one_library_uses": [asdict(usage) for usage in self.key_usage],
            "tensors_dropped_or_made_up": self.parameters,
            "smallest_routing_margins": self.margins,
            "config_sha256": self.config_sha256,
            "weights_sha256": self.weights_sha256,
        }
        return found | (self.measured.to_json() if self.measured else {})


@dataclass(frozen=True)
class MutationOutcome:
    """A known fault, and where the comparison noticed it first; `where` is None where it did not."""

    name: str
    architecture: str
    where: str | None
    first_fault: str | None

    @property
    def caught(self) -> bool:
        return self.where is not None

    def to_json(self) -> Json:
        return {
            "name": self.name,
            "model": self.architecture,
            "caught": self.caught,
            "where": self.where,
            "said": self.first_fault,
        }


@dataclass(frozen=True)
class MutationThreshold:
    """Smallest relative size of a fault that is still caught, in steps of ten; None where none is."""

    name: str
    smallest: float | None


@dataclass(frozen=True)
class SelfTest:
    """Results of putting known faults into PyTorch's side."""

    outcomes: tuple[MutationOutcome, ...]
    thresholds: tuple[MutationThreshold, ...]

    @property
    def n_caught(self) -> int:
        return sum(outcome.caught for outcome in self.outcomes)

    @property
    def score(self) -> float:
        """Return the mutation score in percent."""
        return 100 * self.n_caught / len(self.outcomes)

    @property
    def passed(self) -> bool:
        return self.n_caught == len(self.outcomes)

    def to_json(self) -> Json:
        return {
            "caught": self.n_caught,
            "faults": [outcome.to_json() for outcome in self.outcomes],
            "smallest_caught": {threshold.name: threshold.smallest for threshold in self.thresholds},
        }


def _pair(tolerance: Tolerance) -> list[float]:
    return [tolerance.rmse, tolerance.largest]


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts))]


def _ratio(numerator: float, denominator: float) -> float:
    if numerator == denominator:
        return 1.0
    return numerator / denominator if denominator else np.inf


def _finite(value: Any) -> Any:
    """Replace numbers that JSON cannot hold by None."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
