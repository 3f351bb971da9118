"""mlx-lm's model measured against transformers in float64: as a whole, in every way of running it, and by module.

The truth is transformers' own code with its casts to float32 lifted. mlx-lm's error may be twice that of transformers
in float32 (RMSE; the largest, four times). A token may go to other experts than the truth's only where they tie up to
rounding; all is judged with the truth's experts in both libraries. Where mlx-lm's routers cannot be told them, what
follows a tie in the row is not judged; nor is it in what mlx-lm writes by itself.

B batch, T time, V vocabulary, N tokens (B·T), E experts, K experts per token, L routers.
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

Choice = tuple[Array, NDArray[np.int64]]  # of a router: scores (N, E), experts (N, K)

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

    logits_BTV: Array  # with its own choices of experts
    ways: tuple[Judged, ...]  # of running the model: its logits
    modules: tuple[Judged, ...]  # in the order in which they finish, each fed the truth's input
    kl: float  # nats per token, of mlx-lm's distribution from the truth's
    top1_agreement: float  # fraction of positions with the same likeliest token
    wrong_tokens: int  # generated greedily, where rounding cannot explain them
    remarks: tuple[str, ...]
    judged: int  # positions
    flips: int = 0  # choices of other experts where they tie up to rounding
    misrouted: int = 0  # where they do not

    @property
    def passed(self) -> bool:
        return not self.wrong_tokens and not self.misrouted and all(way.passed for way in self.ways)

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
        self.truth_BTV, choices = exact.routed_logits(tokens_BT)
        self._routes = [experts_NK.reshape(*tokens_BT.shape, -1) for _, experts_NK in choices]
        float32_BTV, in_float32 = torch.routed_logits(tokens_BT, self._routes)
        self.logits = Expected.of(self.truth_BTV, float32_BTV)
        self._float32_BTV = float32_BTV
        self._tied_LBT, self.margins = self._ties(choices, in_float32, tokens_BT.shape)

    def measure(self, mlx: Any, by_module: bool = True) -> Measured:
        """Raises InputError where experts tie from the first tokens on, and cannot be told to mlx-lm."""
        tokens_BT, routes, remarks = self.tokens_BT, self._routes, list[str]()
        n_rows, n_time = tokens_BT.shape
        logits_BTV, chosen = mlx.routed_logits(tokens_BT, routes)
        judged_BT, flips, misrouted = np.ones(tokens_BT.shape, bool), 0, 0
        if [choice.size for choice in chosen] == [route.size for route in routes]:
            flips, misrouted = self._flips(chosen)
        else:
            judged_BT, routes, logits_BTV = _before_ties(self._tied_LBT), [], mlx.logits(tokens_BT)
            remarks.append(
                f"routing: mlx-lm's routers cannot be told the truth's experts ({len(chosen)} choices seen of "
                f"{len(self._routes)}), so {judged_BT.size - judged_BT.sum()} of {judged_BT.size} positions, at ties "
                "of experts and after, are not judged"
            )
        if not judged_BT.any():
            raise InputError("experts tie up to rounding from the first token on; take another --seed")
        half, third = n_time // 2, n_time // 3 + 1
        padding = [3 + 2 * row for row in range(n_rows)]
        ways: dict[str, Callable[[], Array | None]] = {
            "prefill": lambda: logits_BTV,
            "one token at a time": lambda: mlx.logits_in_chunks(tokens_BT, [half, *[1] * (n_time - half)], routes),
            "in chunks": lambda: mlx.logits_in_chunks(tokens_BT, [third, 1, n_time - third - 1], routes),
            "left padding": lambda: mlx.logits_after_padding(tokens_BT, padding, routes),
        }
        if n_rows > 1:
            ways["one row at a time"] = lambda: np.concatenate([
                mlx.routed_logits(row_T[None], [route[[row]] for route in routes])[0]
                for row, row_T in enumerate(tokens_BT)
            ])  # fmt: skip
        judged, expected = [], Expected.of(self.truth_BTV[judged_BT], self._float32_BTV[judged_BT])
        for name, run in ways.items():
            try:
                found_BTV = run()
            except Exception as error:  # whatever a library cannot do
                remarks.append(f"{name}: mlx-lm fails with {said(error)}")
                continue
            if found_BTV is None:
                remarks.append(f"{name}: not judged, mlx-lm's cache for this model has none")
                continue
            found = Error.of(found_BTV[judged_BT], expected.truth)
            judged.append(Judged(name, found, expected.float32, expected.floor, Statistics.of(expected.truth)))
        kl, top1_agreement = _impact(logits_BTV[judged_BT], expected.truth)
        wrong_tokens, unsettled = self._wrong_tokens(mlx, Error.of(logits_BTV[judged_BT], expected.truth).largest)
        if unsettled:
            remarks.append(f"greedy generation: {unsettled} tokens, at ties of experts and after, are not judged")
        return Measured(
            logits_BTV=mlx.logits(tokens_BT) if routes else logits_BTV,
            ways=tuple(judged),
            modules=tuple(self._modules(mlx, routes, judged_BT)) if by_module else (),
            kl=kl,
            top1_agreement=top1_agreement,
            wrong_tokens=wrong_tokens,
            remarks=tuple(remarks),
            judged=int(judged_BT.sum()),
            flips=flips,
            misrouted=misrouted,
        )

    def _flips(self, chosen: Sequence[NDArray[np.int64]]) -> tuple[int, int]:
        """Choices of experts that are not the truth's, where they tie up to rounding, and elsewhere."""
        if not self._routes:
            return 0, 0
        flipped_LBT = np.array([
            (np.sort(choice.reshape(route.shape), axis=-1) != np.sort(route, axis=-1)).any(axis=-1)
            for choice, route in zip(chosen, self._routes, strict=True)
        ])  # fmt: skip
        return int((flipped_LBT & self._tied_LBT).sum()), int((flipped_LBT & ~self._tied_LBT).sum())

    def _wrong_tokens(self, mlx: Any, error: float) -> tuple[int, int]:
        """Generated tokens that are not the truth's likeliest, where its margin is more than two errors; and those that
        follow a tie of experts, which may be anything.
        """
        start = min(8, self.tokens_BT.shape[1] - GENERATED)
        if start < 1:
            return 0, 0
        text_BT = mlx.generate(self.tokens_BT[:, :start], GENERATED)
        truth_BTV, choices = self._exact.routed_logits(text_BT[:, :-1])
        routes = [experts_NK.reshape(*text_BT[:, :-1].shape, -1) for _, experts_NK in choices]
        in_float32 = self._torch.routed_logits(text_BT[:, :-1], routes)[1] if routes else []
        tied_LBT, _ = self._ties(choices, in_float32, text_BT[:, :-1].shape)
        settled_BT, truth_BTV = _before_ties(tied_LBT)[:, start - 1 :], truth_BTV[:, start - 1 :]
        chosen_BT = np.take_along_axis(truth_BTV, text_BT[:, start:, None].astype(np.int64), axis=-1)[..., 0]
        wrong_BT = truth_BTV.max(axis=-1) - chosen_BT > 2 * error
        return int((wrong_BT & settled_BT).sum()), int((~settled_BT).sum())

    def _modules(self, mlx: Any, routes: Sequence[NDArray[np.int64]], judged_BT: NDArray[np.bool_]) -> Iterator[Judged]:
        """Every module that both libraries call by one name, and that makes rows of one length for each token."""

        def rows(array: Array) -> Array:
            kept: Array = array.reshape(judged_BT.size, -1)[judged_BT.ravel()]
            return kept

        names = (self._exact.module_names() & mlx.module_names()) - {""}
        _, exact = self._exact.trace(self.tokens_BT, names)
        _, torch = self._torch.trace(self.tokens_BT, names, self._routes)
        _, found = mlx.trace(self.tokens_BT, names, routes)
        common = [
            name for name in exact if name in torch and name in found and self._are_alike(exact[name], found[name])
        ]
        wrong = {name for name in common if _starts_wrong(*(rows(of[name][0]) for of in (exact, torch, found)))}
        for place, name in enumerate(common):
            x, y = exact[name]
            rounded = x.astype(np.float32) if x.dtype.kind == "f" else x
            truth, in_torch = self._exact.again(name, rounded), self._torch.again(name, rounded)
            in_mlx = mlx.again(name, rounded.reshape(found[name][0].shape).astype(found[name][0].dtype))
            expected = Expected.of(rows(truth), rows(in_torch))
            propagated = [Error.of(rows(other), rows(y)) for other in (found[name][1], torch[name][1])]
            yield Judged(
                name,
                Error.of(rows(in_mlx), expected.truth),
                expected.float32,
                expected.floor,
                Statistics.of(expected.truth),
                CHECKPOINT_SLACK,
                (propagated[0], propagated[1]),
                _next(common[place:], exact) in {None, *wrong},
            )

    def _are_alike(self, one: tuple[Array, Array], other: tuple[Array, Array]) -> bool:
        sizes = [(x.size, y.size) for x, y in (one, other)]
        return sizes[0] == sizes[1] and not any(size % self.tokens_BT.size for size in sizes[0])

    def _ties(
        self, choices: Sequence[Choice], in_float32: Sequence[Choice], shape: tuple[int, ...]
    ) -> tuple[NDArray[np.bool_], tuple[float, ...]]:
        """(L, B, T): where a router is so close to a tie that rounding may decide; and the smallest margins."""
        tied, smallest = [], []
        for (exact_NE, experts_NK), (float32_NE, _) in zip(choices, in_float32, strict=True):
            margin_N, moved_NE = margins(exact_NE, experts_NK), np.abs(float32_NE - exact_NE)
            error = moved_NE[np.isfinite(moved_NE)].max()  # experts that are out of the question have scores of -∞
            tied.append((margin_N <= TIE * error).reshape(shape))
            smallest.append(float(margin_N.min()))
        return np.array(tied, bool).reshape(-1, *shape), tuple(smallest)


def _before_ties(tied_LBT: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """(B, T): no router ties there or before."""
    before: NDArray[np.bool_] = ~np.maximum.accumulate(tied_LBT.any(axis=0), axis=1)
    return before


def _starts_wrong(exact: Array, torch: Array, found: Array) -> bool:
    ratio, _ = Error.of(found, exact).times(Error.of(torch, exact), Error.of(exact.astype(np.float32), exact))
    return ratio > CHECKPOINT_SLACK * RATIO_RMSE


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
