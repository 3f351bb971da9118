"""Measure mlx-lm against transformers in float64: as a whole, in every way of running it, and module by module.

The reference is transformers' own code with its casts to float32 lifted. mlx-lm's error may be twice that of
transformers in float32 (RMSE; the largest error, four times). A token may go to other experts than the reference's only
where experts tie up to rounding; both libraries are then judged with the reference's experts. Where mlx-lm's routers
cannot be overridden, positions after a tie in the row are not judged, nor are they in greedy text.

B batch, T time, V vocabulary, N tokens (B·T), E experts, K experts per token, L routers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_moe.errors import InputError, one_line
from mlx_moe.training.backend import Tokens
from parity.judgement import log_softmax
from parity.numpy_model import Array
from parity.reference_forward import Expected, margins
from parity.report import LibraryMeasurement, LibraryTensorVerdict, RouterChoice, TensorError, TensorStatistics
from parity.tolerances import CHECKPOINT_SLACK, TO_OTHER

GENERATED = 16  # tokens
ROUTER_TIE = 4.0  # rounding may decide where a router's margin is at most this many times transformers' error there


class LibraryComparison:
    """Reference of a model on tokens (B, T): transformers, exact and in float32."""

    def __init__(self, torch: Any, exact: Any, tokens_BT: Tokens):
        self._torch, self._exact, self.tokens_BT = torch, exact, tokens_BT
        self.reference_BTV, choices = exact.routed_logits(tokens_BT)
        self._routes = [experts_NK.reshape(*tokens_BT.shape, -1) for _, experts_NK in choices]
        float32_BTV, in_float32 = torch.routed_logits(tokens_BT, self._routes)
        self.logits = Expected.of(self.reference_BTV, float32_BTV)
        self._float32_BTV = float32_BTV
        self._tied_LBT, self.margins = self._ties(choices, in_float32, tokens_BT.shape)

    def measure(self, mlx: Any, by_module: bool = True) -> LibraryMeasurement:
        """Return mlx-lm's errors; those of single modules only if `by_module`.

        Raises InputError where experts tie from the first token on and mlx-lm's routers cannot be overridden.
        """
        tokens_BT, routes, remarks = self.tokens_BT, self._routes, list[str]()
        n_rows, n_time = tokens_BT.shape
        logits_BTV, chosen = mlx.routed_logits(tokens_BT, routes)
        judged_BT, flips, misrouted = np.ones(tokens_BT.shape, bool), 0, 0
        if [choice.size for choice in chosen] == [route.size for route in routes]:
            flips, misrouted = self._flips(chosen)
        else:
            judged_BT, routes, logits_BTV = _before_ties(self._tied_LBT), [], mlx.logits(tokens_BT)
            remarks.append(
                f"routing: mlx-lm's routers cannot be overridden ({len(chosen)} choices seen of "
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
        judged, expected = [], Expected.of(self.reference_BTV[judged_BT], self._float32_BTV[judged_BT])
        for name, run in ways.items():
            try:
                found_BTV = run()
            except Exception as error:  # libraries raise anything
                remarks.append(f"{name}: mlx-lm fails with {describe_error(error)}")
                continue
            if found_BTV is None:
                remarks.append(f"{name}: not judged, mlx-lm's cache for this model has no padding")
                continue
            found = TensorError.between(found_BTV[judged_BT], expected.exact)
            judged.append(
                LibraryTensorVerdict(name, found, expected.float32, expected.floor, TensorStatistics.of(expected.exact))
            )
        kl, top1_agreement = _impact(logits_BTV[judged_BT], expected.exact)
        wrong_tokens, unsettled = self._wrong_tokens(
            mlx, TensorError.between(logits_BTV[judged_BT], expected.exact).largest
        )
        if unsettled:
            remarks.append(f"greedy generation: {unsettled} tokens, at ties of experts and after, are not judged")
        return LibraryMeasurement(
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
        """Count choices of other experts than the reference's: where they tie up to rounding, and elsewhere."""
        if not self._routes:
            return 0, 0
        flipped_LBT = np.array([
            (np.sort(choice.reshape(route.shape), axis=-1) != np.sort(route, axis=-1)).any(axis=-1)
            for choice, route in zip(chosen, self._routes, strict=True)
        ])  # fmt: skip
        return int((flipped_LBT & self._tied_LBT).sum()), int((flipped_LBT & ~self._tied_LBT).sum())

    def _wrong_tokens(self, mlx: Any, error: float) -> tuple[int, int]:
        """Count generated tokens that trail the reference's likeliest by more than two errors, and unsettled tokens.

        Tokens that follow a tie of experts are unsettled: any token may be right.
        """
        start = min(8, self.tokens_BT.shape[1] - GENERATED)
        if start < 1:
            return 0, 0
        text_BT = mlx.generate(self.tokens_BT[:, :start], GENERATED)
        reference_BTV, choices = self._exact.routed_logits(text_BT[:, :-1])
        routes = [experts_NK.reshape(*text_BT[:, :-1].shape, -1) for _, experts_NK in choices]
        in_float32 = self._torch.routed_logits(text_BT[:, :-1], routes)[1] if routes else []
        tied_LBT, _ = self._ties(choices, in_float32, text_BT[:, :-1].shape)
        settled_BT, reference_BTV = _before_ties(tied_LBT)[:, start - 1 :], reference_BTV[:, start - 1 :]
        chosen_BT = np.take_along_axis(reference_BTV, text_BT[:, start:, None].astype(np.int64), axis=-1)[..., 0]
        wrong_BT = reference_BTV.max(axis=-1) - chosen_BT > 2 * error
        return int((wrong_BT & settled_BT).sum()), int((~settled_BT).sum())

    def _modules(
        self, mlx: Any, routes: Sequence[NDArray[np.int64]], judged_BT: NDArray[np.bool_]
    ) -> Iterator[LibraryTensorVerdict]:
        """Judge every module that both libraries call by one name, with one row of equal length per token."""

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
            reference, in_torch = self._exact.again(name, rounded), self._torch.again(name, rounded)
            in_mlx = mlx.again(name, rounded.reshape(found[name][0].shape).astype(found[name][0].dtype))
            expected = Expected.of(rows(reference), rows(in_torch))
            propagated = [TensorError.between(rows(other), rows(y)) for other in (found[name][1], torch[name][1])]
            yield LibraryTensorVerdict(
                name,
                TensorError.between(rows(in_mlx), expected.exact),
                expected.float32,
                expected.floor,
                TensorStatistics.of(expected.exact),
                CHECKPOINT_SLACK,
                (propagated[0], propagated[1]),
                _next(common[place:], exact) in {None, *wrong},
            )

    def _are_alike(self, left: tuple[Array, Array], right: tuple[Array, Array]) -> bool:
        sizes = [(x.size, y.size) for x, y in (left, right)]
        return sizes[0] == sizes[1] and not any(size % self.tokens_BT.size for size in sizes[0])

    def _ties(
        self, choices: Sequence[RouterChoice], in_float32: Sequence[RouterChoice], shape: tuple[int, ...]
    ) -> tuple[NDArray[np.bool_], tuple[float, ...]]:
        """Return where routers are so close to a tie that rounding may decide (L, B, T), and their smallest margins."""
        tied, smallest = [], []
        for (exact_NE, experts_NK), (float32_NE, _) in zip(choices, in_float32, strict=True):
            margin_N, moved_NE = margins(exact_NE, experts_NK), np.abs(float32_NE - exact_NE)
            error = moved_NE[np.isfinite(moved_NE)].max()  # excluded experts have scores of -∞
            tied.append((margin_N <= ROUTER_TIE * error).reshape(shape))
            smallest.append(float(margin_N.min()))
        return np.array(tied, bool).reshape(-1, *shape), tuple(smallest)


def _before_ties(tied_LBT: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return whether no router ties here or earlier in the row, (B, T)."""
    before: NDArray[np.bool_] = ~np.maximum.accumulate(tied_LBT.any(axis=0), axis=1)
    return before


def _starts_wrong(exact: Array, torch: Array, found: Array) -> bool:
    ratio, _ = TensorError.between(found, exact).ratios_to(
        TensorError.between(torch, exact), TensorError.between(exact.astype(np.float32), exact)
    )
    return ratio > CHECKPOINT_SLACK * TO_OTHER.rmse


def describe_error(error: Exception) -> str:
    """Return a library's exception in one short line."""
    return f"{type(error).__name__}: {one_line(error, 300)}"


def _next(names: Sequence[str], exact: Mapping[str, tuple[Array, Array]]) -> str | None:
    """Return the first later module that neither contains the first one nor shares its input; None if there is none."""
    first, *rest = names
    for name in rest:
        if not first.startswith(f"{name}.") and not np.array_equal(exact[name][0], exact[first][0]):
            return name
    return None


def _impact(found_NV: Array, reference_NV: NDArray[np.float64]) -> tuple[float, float]:
    found, reference = log_softmax(found_NV), log_softmax(reference_NV)
    kl = float((np.exp(found) * (found - reference)).sum(-1).mean())
    return kl, float((found.argmax(-1) == reference.argmax(-1)).mean())
