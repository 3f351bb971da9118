"""mlx-lm's model measured against transformers in float64: as a whole, in every way of running it, and by module.

The truth is transformers' own code with its casts to float32 lifted. mlx-lm's error may be twice that of transformers
in float32 (RMSE; the largest, four times). Where experts tie up to rounding, what follows in the row is not judged.

B batch, T time, V vocabulary, N tokens (B·T), E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_moe.errors import InputError, one_line
from mlx_moe.training.backend import Tokens
from parity.oracle import Array
from parity.truth import Error, Expected, Statistics, margins
from parity.yardstick import CHECKPOINT_SLACK, RATIO_LARGEST, RATIO_RMSE, log_softmax

GENERATED = 16  # tokens
TIE = 4.0  # margins of routers up to so many times transformers' error there may fall either way


@dataclass(frozen=True)
class Judged:
    """mlx-lm's error in one tensor beside that of transformers in float32."""

    name: str
    mlx: Error
    torch: Error
    floor: Error
    statistics: Statistics
    slack: float = 1.0
    propagated: tuple[Error, Error] | None = None  # mlx-lm's and transformers', the module fed what came so far
    is_followed: bool = True  # what comes after it is wrong, too

    @property
    def ratios(self) -> tuple[float, float]:
        """RMSE and largest error; what rounding the truth costs is nobody's fault."""
        return self.mlx.times(self.torch, self.floor)

    @property
    def passed(self) -> bool:
        rmse, largest = self.ratios
        return rmse <= self.slack * RATIO_RMSE and largest <= self.slack * RATIO_LARGEST

    def __str__(self) -> str:
        (rmse, largest), stats = self.ratios, self.statistics
        return (
            f"{self.name}: mlx-lm is {rmse:.3g} times as far from the truth as transformers (RMSE {self.mlx.rmse:.1e} "
            f"against {self.torch.rmse:.1e}; limit {self.slack * RATIO_RMSE:g}), at most {largest:.3g} times (limit "
            f"{self.slack * RATIO_LARGEST:g}). The truth there: mean {stats.mean:.2g}, std {stats.std:.2g}, "
            f"{stats.smallest:.3g} to {stats.largest:.3g}"
        )


@dataclass(frozen=True)
class Measured:
    """What mlx-lm computes on these tokens."""

    logits_BTV: Array
    ways: tuple[Judged, ...]  # of running the model: its logits
    modules: tuple[Judged, ...]  # in the order in which they finish, each fed the truth's input
    kl: float  # nats per token, of mlx-lm's distribution from the truth's
    top1_agreement: float  # fraction of positions with the same likeliest token
    wrong_tokens: int  # generated greedily, where rounding cannot explain them
    remarks: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.wrong_tokens and all(way.passed for way in self.ways)

    @property
    def first_module(self) -> Judged | None:
        """The first module that is wrong by itself. One whose parent is right is not, nor one after which all is right:
        libraries may mean different things by one name.
        """
        names = {module.name for module in self.modules}
        failed = {module.name for module in self.modules if not module.passed and module.is_followed}
        return next(
            (
                module
                for module in self.modules
                if module.name in failed and all(above in failed for above in _parents(module.name) if above in names)
            ),
            None,
        )


class Bench:
    """A model in transformers, in float32 and exact, on tokens (B, T)."""

    def __init__(self, torch: Any, exact: Any, tokens_BT: Tokens):
        self._torch, self._exact, self.tokens_BT = torch, exact, tokens_BT
        self.truth_BTV, self._float32_BTV = exact.logits(tokens_BT), torch.logits(tokens_BT)
        # `margins`: of every router, the smallest.
        self.judged_BT, self.margins = self._settled(tokens_BT)
        if not self.judged_BT.any():
            raise InputError("experts tie up to rounding from the first token on; take another --seed")
        self.logits = Expected.of(self.truth_BTV[self.judged_BT], self._float32_BTV[self.judged_BT])

    def error(self, logits_BTV: Array) -> Error:
        return Error.of(logits_BTV[self.judged_BT], self.logits.truth)

    def measure(self, mlx: Any, by_module: bool = True) -> Measured:
        tokens_BT = self.tokens_BT
        n_rows, n_time = tokens_BT.shape
        logits_BTV, remarks = mlx.logits(tokens_BT), []
        half, third = n_time // 2, n_time // 3 + 1
        ways: dict[str, Callable[[], Array | None]] = {
            "prefill": lambda: logits_BTV,
            "one token at a time": lambda: mlx.logits_in_chunks(tokens_BT, [half, *[1] * (n_time - half)]),
            "in chunks": lambda: mlx.logits_in_chunks(tokens_BT, [third, 1, n_time - third - 1]),
            "left padding": lambda: mlx.logits_after_padding(tokens_BT, [3 + 2 * row for row in range(n_rows)]),
        }
        if n_rows > 1:
            ways["one row at a time"] = lambda: np.concatenate([mlx.logits(row_T[None]) for row_T in tokens_BT])
        judged = []
        for name, run in ways.items():
            try:
                found_BTV = run()
            except Exception as error:  # whatever a library cannot do
                remarks.append(f"{name}: mlx-lm fails with {said(error)}")
                continue
            if found_BTV is None:
                remarks.append(f"{name}: not judged, mlx-lm's cache for this model has none")
            else:
                judged.append(self._judged(name, found_BTV))
        kl, top1_agreement = _impact(logits_BTV[self.judged_BT], self.logits.truth)
        return Measured(
            logits_BTV=logits_BTV,
            ways=tuple(judged),
            modules=tuple(self._modules(mlx)) if by_module else (),
            kl=kl,
            top1_agreement=top1_agreement,
            wrong_tokens=self._wrong_tokens(mlx, self.error(logits_BTV).largest),
            remarks=tuple(remarks),
        )

    def _judged(self, name: str, logits_BTV: Array) -> Judged:
        expected = self.logits
        return Judged(name, self.error(logits_BTV), expected.float32, expected.floor, Statistics.of(expected.truth))

    def _wrong_tokens(self, mlx: Any, error: float) -> int:
        """Generated tokens that are not the truth's likeliest, where its margin is more than two errors."""
        start = min(8, self.tokens_BT.shape[1] - GENERATED)
        if start < 1:
            return 0
        text_BT = mlx.generate(self.tokens_BT[:, :start], GENERATED)
        truth_BTV = self._exact.logits(text_BT[:, :-1])[:, start - 1 :]
        chosen_BT = np.take_along_axis(truth_BTV, text_BT[:, start:, None].astype(np.int64), axis=-1)[..., 0]
        settled_BT = self._settled(text_BT[:, :-1])[0][:, start - 1 :]
        return int(((truth_BTV.max(axis=-1) - chosen_BT > 2 * error) & settled_BT).sum())

    def _modules(self, mlx: Any) -> Iterator[Judged]:
        """Every module that both libraries call by one name, and that makes rows of one length for each token."""
        names = (self._exact.module_names() & mlx.module_names()) - {""}
        _, exact = self._exact.trace(self.tokens_BT, names)
        _, torch = self._torch.trace(self.tokens_BT, names)
        _, found = mlx.trace(self.tokens_BT, names)
        common = [
            name for name in exact if name in torch and name in found and self._are_alike(exact[name], found[name])
        ]
        wrong = {name for name in common if self._starts_wrong(exact[name][0], torch[name][0], found[name][0])}
        for place, name in enumerate(common):
            x, y = exact[name]
            rounded = x.astype(np.float32) if x.dtype.kind == "f" else x
            truth, in_torch = self._exact.again(name, rounded), self._torch.again(name, rounded)
            in_mlx = mlx.again(name, rounded.reshape(found[name][0].shape).astype(found[name][0].dtype))
            expected = Expected.of(self._rows(truth), self._rows(in_torch))
            propagated = [Error.of(self._rows(other), self._rows(y)) for other in (found[name][1], torch[name][1])]
            yield Judged(
                name,
                Error.of(self._rows(in_mlx), expected.truth),
                expected.float32,
                expected.floor,
                Statistics.of(expected.truth),
                CHECKPOINT_SLACK,
                (propagated[0], propagated[1]),
                _next(common[place:], exact) in {None, *wrong},
            )

    def _are_alike(self, one: tuple[Array, Array], other: tuple[Array, Array]) -> bool:
        sizes = [(x.size, y.size) for x, y in (one, other)]
        return sizes[0] == sizes[1] and not any(size % self.judged_BT.size for size in sizes[0])

    def _starts_wrong(self, exact: Array, torch: Array, found: Array) -> bool:
        truth = self._rows(exact)
        ratio, _ = Error.of(self._rows(found), truth).times(
            Error.of(self._rows(torch), truth), Error.of(truth.astype(np.float32), truth)
        )
        return ratio > CHECKPOINT_SLACK * RATIO_RMSE

    def _rows(self, array: Array) -> Array:
        """Those of the tokens that are judged."""
        return array.reshape(self.judged_BT.size, -1)[self.judged_BT.ravel()]

    def _settled(self, tokens_BT: Tokens) -> tuple[NDArray[np.bool_], tuple[float, ...]]:
        """Where no router, there or before, is so close to a tie that rounding may decide; and the smallest margins."""
        settled_BT, smallest = np.ones(tokens_BT.shape, bool), list[float]()
        in_float32 = self._torch.routers(tokens_BT)
        for name, (logits_NE, experts_NK) in self._exact.routers(tokens_BT).items():
            if experts_NK.shape[-1] < logits_NE.shape[-1]:
                margin_BT = margins(logits_NE, experts_NK).reshape(tokens_BT.shape)
                tied_BT = margin_BT <= TIE * np.abs(in_float32[name][0] - logits_NE).max()
                settled_BT &= ~np.maximum.accumulate(tied_BT, axis=1)
                smallest.append(float(margin_BT.min()))
        return settled_BT, tuple(smallest)


def said(error: Exception) -> str:
    """An exception of a library in a few words."""
    return f"{type(error).__name__}: {one_line(error, 300)}"


def _next(names: Sequence[str], exact: Mapping[str, tuple[Array, Array]]) -> str | None:
    """The first module after the first one that neither holds it nor shares its input."""
    first, *rest = names
    for name in rest:
        if not first.startswith(f"{name}.") and not np.array_equal(exact[name][0], exact[first][0]):
            return name
    return None


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts))]


def _impact(found_NV: Array, truth_NV: NDArray[np.float64]) -> tuple[float, float]:
    found, truth = log_softmax(found_NV), log_softmax(truth_NV)
    kl = float((np.exp(found) * (found - truth)).sum(-1).mean())
    return kl, float((found.argmax(-1) == truth.argmax(-1)).mean())
