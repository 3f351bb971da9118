"""A model as mlx-lm opens it: its logits, its modules one by one, with a cache, and what it leaves out.

B batch, T time, V vocabulary, N tokens (B·T), E experts, K experts per token.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx_moe.model  # noqa: F401 (sets what MLX reads when mlx is loaded)

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import BatchKVCache, KVCache, make_prompt_cache
from mlx_lm.utils import _get_classes, load_model
from numpy.typing import NDArray

from mlx_moe.hub.foreign import opened_for_library
from mlx_moe.training.backend import Logits, Tokens

Array = NDArray[Any]
RouterChoices = Sequence[NDArray[np.int64]]  # of every router in turn, experts (B, T, K)


def logits(folder: Path, tokens_BT: Tokens) -> Logits:
    """Return the logits of the model in a folder, (B, T, V), in float32 on the CPU."""
    return LibraryModel(folder).logits(tokens_BT)


class LibraryModel:
    """Model of a folder in float32 on the CPU; `changes` replace keys of its config."""

    def __init__(self, folder: Path, changes: Mapping[str, Any] | None = None):
        with opened_for_library(folder) as found, mx.stream(mx.cpu):
            self._model, self._config = load_model(found.folder, lazy=True, model_config=dict(changes or {}))
            self._model.set_dtype(mx.float32)
        self._shapes = {name: tensor.shape for name, tensor in found.tensors.items()}
        self._calls: dict[str, tuple[tuple[Any, ...], dict[str, Any], RouterChoices]] = {}

    def logits(self, tokens_BT: Tokens) -> Array:
        with mx.stream(mx.cpu):
            return np.array(self._model(mx.array(tokens_BT)))

    def routed_logits(self, tokens_BT: Tokens, routes: RouterChoices = ()) -> tuple[Array, RouterChoices]:
        """Return the logits, and the experts (N, K) that each router would choose, in turn.

        `routes` replace these choices; without them none are returned. Where mlx-lm chooses in a way that is not known
        here, there are fewer or more choices than routes.
        """
        with _choosing(routes) as choices:
            logits_BTV = self.logits(tokens_BT)
        return logits_BTV, [np.array(chosen, np.int64) for chosen, _ in choices]

    def logits_in_chunks(self, tokens_BT: Tokens, lengths: Sequence[int], routes: RouterChoices = ()) -> Array:
        """Return the logits (B, T, V) computed with a cache, in chunks of these lengths."""
        places, parts = np.cumsum(lengths)[:-1].tolist(), []
        routes_of_parts = zip(*(np.split(route, places, axis=1) for route in routes), strict=True)
        with mx.stream(mx.cpu):
            cache = make_prompt_cache(self._model)
            for part in np.split(tokens_BT, places, axis=1):
                with _choosing(next(routes_of_parts, ())):
                    parts.append(self._model(mx.array(part), cache))
            return np.array(mx.concatenate(parts, axis=1))

    def logits_after_padding(
        self, tokens_BT: Tokens, padding: Sequence[int], routes: RouterChoices = ()
    ) -> Array | None:
        """Return the logits (B, T, V) with `padding` tokens before each row; None if the cache knows no padding."""
        if any(type(cache) is not KVCache for cache in make_prompt_cache(self._model)):
            return None
        longest = max(padding) + tokens_BT.shape[1]
        rows = [np.pad(row, (n, longest - n - len(row))) for row, n in zip(tokens_BT, padding, strict=True)]
        padded_routes = [
            np.array([
                np.pad(row, ((n, longest - n - len(row)), (0, 0)), mode="edge")
                for row, n in zip(route, padding, strict=True)
            ])
            for route in routes
        ]  # fmt: skip
        with mx.stream(mx.cpu), _choosing(padded_routes):
            cache = [BatchKVCache(list(padding)) for _ in self._model.layers]
            padded_BTV = np.array(self._model(mx.array(np.array(rows)), cache))
        return np.stack([row[n : n + tokens_BT.shape[1]] for row, n in zip(padded_BTV, padding, strict=True)])

    def generate(self, tokens_BT: Tokens, n_tokens: int) -> Tokens:
        """Return the tokens continued greedily, one at a time with a cache, (B, T + n_tokens)."""
        with mx.stream(mx.cpu):
            cache, found = make_prompt_cache(self._model), [mx.array(tokens_BT)]
            for _ in range(n_tokens):
                found.append(self._model(found[-1], cache)[:, -1:].argmax(axis=-1))
            return np.array(mx.concatenate(found, axis=1), np.int32)

    def module_names(self) -> set[str]:
        return {name for name, _ in self._model.named_modules()}

    def trace(
        self, tokens_BT: Tokens, names: Collection[str], routes: RouterChoices = ()
    ) -> tuple[Array, dict[str, tuple[Array, Array]]]:
        """Return the logits, and each module's first input and first output, in the order in which modules finish."""
        found: dict[str, tuple[mx.array, mx.array]] = {}
        modules = {id(module): name for name, module in self._model.named_modules() if name in names}

        def begin() -> int:
            return len(choices)

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, first: int) -> None:
            name, came_out = modules.get(id(module)), output[0] if isinstance(output, tuple) else output
            if name is not None and args and isinstance(args[0], mx.array) and isinstance(came_out, mx.array):
                self._calls[name] = (args, kwargs, [np.array(taken, np.int64) for _, taken in choices[first:]])
                found[name] = (args[0], came_out)

        kinds = {type(module) for module in self._model.modules()}
        with _choosing(routes) as choices, _watched(kinds, begin, note):
            logits_BTV = self.logits(tokens_BT)
        with mx.stream(mx.cpu):
            return logits_BTV, {name: (np.array(x), np.array(y)) for name, (x, y) in found.items()}

    def again(self, name: str, x: Array) -> Array:
        """Return the output of a traced module for another first input, with all else and the experts as they were."""
        args, kwargs, experts = self._calls[name]
        module = dict(self._model.named_modules())[name]
        with mx.stream(mx.cpu), _choosing(experts):
            output = module(mx.array(x), *args[1:], **kwargs)
            return np.array(output[0] if isinstance(output, tuple) else output)

    def dropped(self) -> tuple[str, ...]:
        """Return the tensors of the files that mlx-lm's `sanitize` leaves out: each is sent through it as a number."""
        if not hasattr(self._model, "sanitize"):
            return ()
        step = 1000  # apart, since a `sanitize` may add 1 to a norm
        with mx.stream(mx.cpu):
            marked = {name: mx.full(shape, step * (i + 1.0)) for i, (name, shape) in enumerate(self._shapes.items())}
            arrived: set[int] = set()
            for array in self._model.sanitize(dict(marked)).values():
                arrived |= set(np.flatnonzero(np.bincount(np.rint(np.array(array).ravel() / step).astype(np.int64))))
        return tuple(name for i, name in enumerate(self._shapes) if i + 1 not in arrived)


def fields(folder: Path) -> dict[str, Any]:
    """Return the keys that mlx-lm's config of this model takes, with defaults; `inspect.Parameter.empty` if
    required."""
    with opened_for_library(folder) as found:
        _, arguments = _get_classes(found.config)
    return {name: field.default for name, field in inspect.signature(arguments).parameters.items()}


@contextmanager
def _choosing(routes: RouterChoices) -> Iterator[list[tuple[mx.array, mx.array]]]:
    """Yield a list that collects each choice of experts: the router's own, and that of `routes`; empty without routes.

    A router is what calls `argpartition` along the last axis, and reads the first k (kth = k − 1) or the last (−k).
    """
    choices: list[tuple[mx.array, mx.array]] = []
    if not routes:
        yield choices
        return
    argpartition, waiting = mx.argpartition, iter(routes)

    def choose(scores: mx.array, /, kth: int, axis: int | None = -1, **kwargs: Any) -> mx.array:
        order = argpartition(scores, kth=kth, axis=axis, **kwargs)
        if axis not in (-1, scores.ndim - 1):
            return order
        k, is_first = (kth + 1, True) if kth >= 0 else (-kth, False)
        chosen = order[..., :k] if is_first else order[..., -k:]
        route = next(waiting, None)
        if route is not None:
            taken = np.zeros((len(route.reshape(-1, k)), scores.shape[-1]), bool)
            np.put_along_axis(taken, route.reshape(-1, k), True, axis=-1)
            order = mx.array(np.argsort(~taken if is_first else taken, axis=-1, kind="stable").astype(np.uint32))
            order = order.reshape(scores.shape)
        taken_ones = order[..., :k] if is_first else order[..., -k:]
        choices.append((chosen.reshape(-1, k), taken_ones.reshape(-1, k)))
        return order

    mx.argpartition = choose
    mx.disable_compile()  # a compiled router would choose again what it chose when it was compiled
    try:
        yield choices
    finally:
        mx.argpartition = argpartition
        mx.enable_compile()


@contextmanager
def _watched(classes: Iterable[type], begin: Callable[[], int], note: Callable[..., None]) -> Iterator[None]:
    """Call `note` after each call of an instance of these classes, with the result of `begin` before it."""

    def watching(call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            first = begin()
            output = call(module, *args, **kwargs)
            note(module, args, kwargs, output, first)
            return output

        return watched

    # An heir before whom it inherits its call from, or that would be watched twice.
    heirs_first = sorted((kind for kind in classes if _is_callable(kind)), key=lambda kind: -len(kind.__mro__))
    own = {kind: vars(kind).get("__call__") for kind in heirs_first}
    for kind in heirs_first:
        setattr(kind, "__call__", watching(kind.__call__))  # noqa: B010
    try:
        yield
    finally:
        for kind, call in own.items():
            delattr(kind, "__call__") if call is None else setattr(kind, "__call__", call)


def _is_callable(kind: type) -> bool:
    """Return whether instances of a class are callable; a class itself always is."""
    return any("__call__" in vars(base) for base in kind.__mro__)
