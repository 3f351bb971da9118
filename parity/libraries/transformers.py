"""A model as transformers opens it: its logits, its modules one by one, and in float64.

B batch, T time, V vocabulary, N tokens (B·T), E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch_ref  # noqa: F401 (sets what PyTorch reads when torch is loaded)

# isort: split
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.initialization import no_init_weights
from transformers.utils import logging

from mlx_moe.hub.foreign import check_described, opened_for_library, refuse_quantized, without_network
from mlx_moe.training.backend import Logits, Tokens
from parity.report import RouterChoice

Array = NDArray[Any]

# What configs call the number of experts.
EXPERT_COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def logits(folder: Path, tokens_BT: Tokens) -> Logits:
    """Return the logits of the model in a folder, (B, T, V), in float32 on the CPU."""
    return LibraryModel(folder).logits(tokens_BT)


class LibraryModel:
    """Model of a folder in float32 on the CPU; with `exact`, in float64 throughout, by the plainest of its code."""

    def __init__(self, folder: Path, exact: bool = False):
        self._exact = exact
        with opened_for_library(folder) as found, _quiet():
            refuse_quantized(found)
            check_described(found, _n_described(found.folder))
            with self._precision():
                self._model, info = AutoModelForCausalLM.from_pretrained(
                    found.folder,
                    dtype=torch.float64 if exact else torch.float32,
                    local_files_only=True,
                    trust_remote_code=False,  # None would ask on standard input
                    use_safetensors=True,
                    generation_config=GenerationConfig(),  # else it looks for a file
                    output_loading_info=True,
                    **({"attn_implementation": "eager"} if exact else {}),
                )
                if exact and hasattr(self._model, "set_experts_implementation"):
                    self._model.set_experts_implementation("eager")  # grouped products know no float64
        self._model.eval()
        self.missing = tuple(sorted(info["missing_keys"]))  # in the model, not in the files: drawn at random
        self.unread = tuple(sorted(info["unexpected_keys"]))  # in the files, not in the model
        self.n_parameters = sum(parameter.numel() for parameter in self._model.parameters())
        self.n_experts = next((n for name in EXPERT_COUNT_KEYS if (n := self.config_value(name))), 0)
        # Arguments of modules that were traced, and the experts that routers in them chose.
        self._calls: dict[str, tuple[tuple[Any, ...], dict[str, Any], list[NDArray[np.int64]]]] = {}

    def config_value(self, name: str) -> Any:
        """Return a value of transformers' config by its name there, which may differ from the file's; None if
        absent."""
        return getattr(self._model.config.get_text_config(), name, None)

    def logits(self, tokens_BT: Tokens) -> Array:
        return self._logits_of(self._model, tokens_BT)

    def routed_logits(
        self, tokens_BT: Tokens, routes: Sequence[NDArray[np.int64]] = ()
    ) -> tuple[Array, list[RouterChoice]]:
        """Return the logits and what each router would choose, in turn; `routes` (B, T, K) replace these choices."""
        with _Choices(self.n_experts, routes) as choices:
            return self.logits(tokens_BT), choices.made

    def logits_with(self, config: Mapping[str, Any], tokens_BT: Tokens) -> Array:
        """Return the logits of the same weights under another config; raise what transformers does if they do not
        fit."""
        with _quiet(), self._precision(), no_init_weights(), without_network():
            changed = AutoConfig.for_model(**{"model_type": self._model.config.model_type, **config})
            model = AutoModelForCausalLM.from_config(changed, trust_remote_code=False).eval()
        given = self.parameter_names()
        state = {name: tensor for name, tensor in self._model.state_dict().items() if name in given}
        left_over = model.load_state_dict(state, strict=False, assign=True)
        model.tie_weights()
        unfilled = {name for name, _ in model.named_parameters()} - given
        if unfilled or left_over.unexpected_keys:
            raise ValueError(f"weights that do not fit: {sorted(unfilled)} {left_over.unexpected_keys}")
        return self._logits_of(model, tokens_BT)

    def parameter_names(self) -> set[str]:
        """Return the names of all parameters; tied ones have one name."""
        return {name for name, _ in self._model.named_parameters()}

    def module_names(self) -> set[str]:
        return {name for name, _ in self._model.named_modules()}

    def trace(
        self, tokens_BT: Tokens, names: Collection[str], routes: Sequence[NDArray[np.int64]] = ()
    ) -> tuple[Array, dict[str, tuple[Array, Array]]]:
        """Return the logits, and each module's first input and first output, in the order in which modules finish.

        Modules that run more than once are left out.
        """
        found: dict[str, list[tuple[Array, Array]]] = {}
        routers_before: dict[str, int] = {}
        choices = _Choices(self.n_experts, routes)

        def begin(name: str) -> Callable[..., None]:
            return lambda module, args: routers_before.update({name: len(choices.taken)})

        def watch(name: str) -> Callable[..., None]:
            def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                went_in, came_out = _first([*args, *kwargs.values()]), _first([output])
                if went_in is not None and came_out is not None:
                    self._calls[name] = (args, kwargs, choices.taken[routers_before[name] :])
                    found.setdefault(name, []).append((_array(went_in), _array(came_out)))

            return note

        modules = dict(self._model.named_modules())
        hooks = [modules[name].register_forward_hook(watch(name), with_kwargs=True) for name in names]
        hooks += [modules[name].register_forward_pre_hook(begin(name)) for name in names]
        try:
            with choices:
                logits_BTV = self.logits(tokens_BT)
        finally:
            for hook in hooks:
                hook.remove()
        return logits_BTV, {name: calls[0] for name, calls in found.items() if len(calls) == 1}

    @torch.no_grad()
    def again(self, name: str, x: Array) -> Array:
        """Return the output of a traced module for another first input, with all else and the experts as they were."""
        args, kwargs, experts = self._calls[name]
        first = _first([*args, *kwargs.values()])
        replacement = torch.from_numpy(x.astype(np.float64 if self._exact and x.dtype.kind == "f" else x.dtype))

        def put(value: Any) -> Any:
            return replacement if value is first else value

        with _Choices(self.n_experts, experts), self._precision():
            output = self._model.get_submodule(name)(*map(put, args), **{key: put(v) for key, v in kwargs.items()})
        return _array(_first([output]))

    @torch.no_grad()
    def _logits_of(self, model: Any, tokens_BT: Tokens) -> Array:
        with self._precision():
            return _array(model(input_ids=torch.from_numpy(tokens_BT).long(), use_cache=False).logits)

    @contextmanager
    def _precision(self) -> Iterator[None]:
        """Compute everything inside in this model's precision."""
        if not self._exact:
            yield
            return
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            with _in_float64():
                yield
        finally:
            torch.set_default_dtype(default)


def _n_described(folder: Path) -> int:
    """Return the number of values in the model that transformers builds from config.json, without allocating them."""
    with torch.device("meta"), no_init_weights():
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, dtype=torch.float32)
    return sum(tensor.numel() for tensor in [*model.parameters(), *model.buffers()])


class _Choices(TorchFunctionMode):
    """Recorder of each choice of experts; `routes`, as far as they are given, replace the choices.

    A router is what takes the `topk` of rows of scores, one for each expert.
    """

    def __init__(self, n_experts: int, routes: Sequence[NDArray[np.int64]]):
        super().__init__()
        self._n_experts, self._routes = n_experts, iter(routes)
        self.made: list[RouterChoice] = []
        self.taken: list[NDArray[np.int64]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if func not in (torch.topk, Tensor.topk) or args[0].ndim != 2 or args[0].shape[-1] != self._n_experts:
            return found
        scores_NE, experts_NK = args[0], found.indices
        self.made.append((_array(scores_NE), _array(experts_NK)))
        route = next(self._routes, None)
        if route is not None:
            experts_NK = torch.from_numpy(route.reshape(experts_NK.shape))
            found = torch.return_types.topk((scores_NE.gather(-1, experts_NK), experts_NK))
        self.taken.append(_array(experts_NK))
        return found


def _in_float64() -> TorchFunctionMode:
    """Return a mode that gives float64 where code asks for float32, as norms, softmaxes and rotations do."""

    class Float64(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            func = Tensor.double if func is Tensor.float else func
            return func(*map(_widened, args), **{name: _widened(value) for name, value in (kwargs or {}).items()})

    return Float64()


def _widened(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def _first(values: list[Any]) -> Tensor | None:
    """Return the first tensor among values and tuples of values."""
    for value in values:
        if isinstance(value, tuple):
            value = _first(list(value))
        if isinstance(value, Tensor):
            return value
    return None


def _array(tensor: Tensor | None) -> Array:
    assert tensor is not None
    array: Array = tensor.detach().numpy()
    return array


@contextmanager
def _quiet() -> Iterator[None]:
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
