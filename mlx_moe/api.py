"""The public functions: `import mlx_moe as mm`. The commands of `mlxmoe` call the same code.

Every function leaves the model that it is given as it was, and returns a new one.

B batch, T time, V vocabulary.
"""

from __future__ import annotations

import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mlx_moe.accounting import ParameterCount, count_parameters
from mlx_moe.accounting.machines import installed_bytes
from mlx_moe.arguments import checked
from mlx_moe.config import (
    DataConfig,
    GrowPhaseConfig,
    ModelConfig,
    PhaseConfig,
    RunConfig,
    TrainPhaseConfig,
    UpcyclePhaseConfig,
    VerificationConfig,
)
from mlx_moe.data.sources import check_text
from mlx_moe.data.tokenizers import Tokenizer, check_tokenizer_fits, make_tokenizer
from mlx_moe.data.tokens import TokenSplits, check_length, is_held_out, prepare
from mlx_moe.errors import InputError, quoted
from mlx_moe.limits import MAX_NEW_TOKENS, MAX_VOCAB_SIZE
from mlx_moe.parameters import Weights, initialize, shapes
from mlx_moe.phases import became, get_phase, lineage_so_far
from mlx_moe.presets import as_overrides, load_architecture, override
from mlx_moe.storage import checkpoint
from mlx_moe.storage.atomic import absolute, creating, make_folder, replacing
from mlx_moe.storage.checkpoint import Checkpoint, TrainerState
from mlx_moe.storage.jsonl import Row
from mlx_moe.storage.tensor_files import check_finite
from mlx_moe.training.backend import Backend, Trainer, choose_backend
from mlx_moe.training.certify import ChangedModel, certify
from mlx_moe.training.console import Console
from mlx_moe.training.loop import Session, train_phase
from mlx_moe.training.run_log import MemoryLog
from mlx_moe.training.stopping import Interruption, TrainingStopped, interruptions
from mlx_moe.transfer.certificate import Certificate
from mlx_moe.transfer.registry import TRANSFERS
from mlx_moe.validation import validate

if TYPE_CHECKING:
    from parity.report import ModelComparison

Texts = Sequence[str]
IDS_AT_A_TIME = 2**24
NO_TOKENIZER = "the model has no tokenizer; give one, such as mm.tokens(texts, tokenizer)"


class Model:
    """A language model on one device of a backend.

    `module` is the `nn.Module` of MLX or PyTorch itself. You may change the values of its weights: `logits`, `save` and
    every function that takes the model see the change. A change of its structure is seen by calls of `module` alone.
    """

    @checked("backend", "weights")
    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        backend: Backend | str = "auto",
        device: str = "auto",
        *,
        tokenizer: Tokenizer | None = None,
        lineage: Sequence[str] = (),
    ):
        """Build a model from weights named as in `mlx_moe.parameters.parameter_table`. They are copied."""
        _check_weights(config, weights)
        self._backend = backend if isinstance(backend, Backend) else choose_backend(backend)
        self._device = device
        self._trainer = self._backend.trainer(config, weights, device=device)
        self.tokenizer = tokenizer
        self.lineage = tuple(lineage) or (config.display_name,)

    @property
    def config(self) -> ModelConfig:
        """The architecture."""
        return self._trainer.config

    @property
    def module(self) -> Any:
        """The `mlx.nn.Module` or `torch.nn.Module` that computes."""
        return self._trainer.module

    @property
    def backend(self) -> str:
        """`mlx` or `torch`."""
        return self._backend.name

    @property
    def device(self) -> str:
        """Name of the device, such as `CPU`, `Metal` or `CUDA`."""
        return self._trainer.device.label

    @property
    def parameters(self) -> ParameterCount:
        """Parameters in all, active per token, and inactive."""
        return count_parameters(self.config)

    def weights(self) -> dict[str, NDArray[np.float32]]:
        """Return all weights by name, as float32 arrays of NumPy.

        Raises InputError where `module` was changed so that the weights are no longer those of `config`.
        """
        weights = self._trainer.weights()
        _check_weights(self.config, weights)
        return weights

    def logits(self, tokens: ArrayLike) -> NDArray[np.float32]:
        """Return the logits that follow each token: (T, V) for tokens (T,), (B, T, V) for tokens (B, T).

        Raises InputError for a token that the model does not have, and for more tokens than its context holds.
        """
        ids = _integers(tokens)
        if ids.ndim not in (1, 2) or not ids.size:
            raise InputError(f"tokens of shape {ids.shape}; give (T,) or (B, T), at least one")
        tokens_BT = np.atleast_2d(ids)
        _check_ids(tokens_BT, self.config.vocab_size)
        if tokens_BT.shape[1] > self.config.context_length:
            raise InputError(
                f"{tokens_BT.shape[1]} tokens, and the model's context holds {self.config.context_length}; give fewer"
            )
        logits_BTV = self._trainer.logits(tokens_BT.astype(np.int32))
        return logits_BTV if ids.ndim == 2 else logits_BTV[0]

    def save(self, folder: str | Path) -> Path:
        """Write a checkpoint that every command and `load` read. Raises InputError where the folder exists."""
        return save(self, folder)

    def __repr__(self) -> str:
        size = f"{self.parameters.total / 1e6:,.2f} M parameters"
        return f"<Model {self.config.display_name}, {size}, {self.backend} on {self.device}>"

    def _next(self, trainer: Trainer, *done: str) -> Model:
        """Return the model of another trainer, with what was `done` added to the lineage."""
        model = Model.__new__(Model)
        model._backend, model._device, model._trainer = self._backend, self._device, trainer
        model.tokenizer, model.lineage = self.tokenizer, (*self.lineage, *done)
        return model

    def _finite_weights(self) -> dict[str, NDArray[np.float32]]:
        weights = self.weights()
        for name, array in weights.items():
            check_finite(name, array, "the model", "load the model again")
        return weights

    def _checkpoint(self, path: Path) -> Checkpoint:
        state = TrainerState(1, 0, self.backend, lineage=self.lineage)
        return Checkpoint(path, self.config, state, self._finite_weights())

    def _tokenizer(self, given: Tokenizer | None = None) -> Tokenizer:
        """Return the tokenizer given, or else the model's own. Raises InputError where it is larger than the model."""
        tokenizer = given or self.tokenizer
        if tokenizer is None:
            raise InputError(NO_TOKENIZER)
        check_tokenizer_fits(tokenizer, self.config.vocab_size, "the tokenizer")
        return tokenizer


@dataclass(frozen=True, eq=False)
class Data(TokenSplits):
    """Tokens to train on and tokens held out, and how to make more of them.

    `source` names what they were read from and `texts` holds what they were made of: a run in a folder needs either.
    """

    tokenizer: Tokenizer | None = None
    source: DataConfig | None = field(default=None, repr=False)
    texts: Texts | None = field(default=None, repr=False)
    validation_fraction: float = 0.05

    def __repr__(self) -> str:
        return f"<Data {len(self.train):,} tokens to train on, {len(self.validation):,} held out>"


@dataclass(frozen=True)
class TrainResult:
    """Result of a training.

    `metrics` has a row per logged step, with the keys of `metrics.jsonl`: loss, learning_rate, tokens_per_s and so on;
    losses in nats per token. `folder` is None where nothing was written. `interrupted`: it ended before its time, on
    Ctrl-C, and `model` has the steps so far.
    """

    model: Model
    metrics: list[Row] = field(repr=False)
    folder: Path | None = None
    interrupted: bool = False

    @property
    def validation_loss(self) -> float:
        """The last validation loss, nats per token."""
        return next(float(row["validation_loss"]) for row in reversed(self.metrics) if "validation_loss" in row)


@dataclass(frozen=True)
class RunResult:
    """A run of phases in a folder, read from there. `history` has a row per phase and boundary."""

    folder: Path
    metrics: list[Row] = field(repr=False)
    history: list[Row] = field(repr=False)

    def model(self, backend: str = "auto", device: str = "auto") -> Model:
        """Load the model of the latest checkpoint."""
        return load(self.folder, backend, device)[0]


@checked()
def load(name: str | Path, backend: str = "auto", device: str = "auto") -> tuple[Model, Tokenizer | None]:
    """Load a model and its tokenizer.

    `name` is a run, `RUN/best`, a checkpoint, a folder of Hugging Face's, or a name on the hub. `backend` is auto, mlx
    or torch; `device` is auto, cpu or gpu. The tokenizer is None where none lies beside the model. Raises InputError
    where there is no such model, or where it is damaged or not supported.
    """
    from mlx_moe.hub.models import open_model
    from mlx_moe.hub.resolve import find_model
    from mlx_moe.inference.decoding import load_tokenizer

    chosen = choose_backend(backend)
    source = open_model(find_model(str(name)))
    tokenizer = load_tokenizer(source) if source.tokenizer_folder is not None else None
    lineage = (source.state.lineage or (source.config.display_name,)) + lineage_so_far(source.state)[
        len(source.state.lineage) :
    ]
    return Model(source.config, source.weights, chosen, device, tokenizer=tokenizer, lineage=lineage), tokenizer


@checked()
def create(
    architecture: str = "nano",
    data: Data | None = None,
    *,
    seed: int = 0,
    backend: str = "auto",
    device: str = "auto",
    **fields: Any,
) -> Model:
    """Create a model with weights drawn anew.

    `architecture` is a preset (simple, smollm, gpt2, llama, nano and others), and `fields` replace what it says:
    d_model, n_layers, n_heads, context_length, moe and so on. The vocabulary is that of the tokenizer of `data`. Raises
    InputError, which names the field, its value and its limit.
    """
    tokenizer = None if data is None else data.tokenizer
    if tokenizer is not None:
        fields = {"vocab_size": tokenizer.vocab_size} | fields
    config = load_architecture(architecture, **fields)
    if tokenizer is not None and config.vocab_size < tokenizer.vocab_size:
        raise InputError(
            f"vocab_size = {config.vocab_size}: the tokenizer has {tokenizer.vocab_size} tokens; give as many, or more"
        )
    _check_room(config)
    return Model(config, initialize(config, seed), backend, device, tokenizer=tokenizer)


@checked("source")
def tokens(
    source: str | Path | Texts | ArrayLike,
    tokenizer: Tokenizer | str | Path | None = None,
    *,
    validation_fraction: float = 0.05,
    n_documents: int | None = None,
    text_field: str = "text",
) -> Data:
    """Turn text into tokens, or take tokens as they are, and hold some out.

    `source` is `stories`, `tinystories` or a path (.txt, .jsonl, .parquet, or a folder of them); a list of texts, each
    a document; or token ids, as an array or as a list of documents. `tokenizer` is a `Tokenizer`, `char`, `bpe:VOCAB`,
    or the name or folder of one of Hugging Face's. Tokens of a named source stay in a cache, `$MLXMOE_CACHE` or
    `~/.cache/mlxmoe`. Raises InputError where the text or the tokenizer cannot be had.
    """
    tokenizer = str(tokenizer) if isinstance(tokenizer, Path) else tokenizer
    named = {"source": str(source)} if isinstance(source, str | Path) else {}
    given = {"validation_fraction": validation_fraction, "n_documents": n_documents, "text_field": text_field}
    validate(DataConfig, named | given)
    if isinstance(source, str | Path):
        return _named_source(str(source), tokenizer, validation_fraction, n_documents, text_field)
    is_ordered = isinstance(source, Iterable) and not isinstance(source, bytes | Mapping | Set | np.generic)
    items: Any = source
    if is_ordered and not (isinstance(items, np.ndarray) and items.dtype.kind in "iu"):
        items = list(items)
    if isinstance(items, list) and items and isinstance(items[0], str):
        return _of_texts(items[:n_documents], tokenizer, validation_fraction)
    if isinstance(tokenizer, str):
        raise InputError(
            f"tokenizer = {quoted(tokenizer)}: token ids leave it no text to learn from; give a Tokenizer, or none"
        )
    ids = _as_ids(items)
    n_held = min(max(1, round(len(ids) * validation_fraction)), len(ids) - 1)
    return Data(ids[:-n_held], ids[-n_held:], tokenizer if isinstance(tokenizer, Tokenizer) else None)


@checked("text")
def upcycle(
    model: Model,
    n_experts: int = 8,
    top_k: int = 2,
    *,
    seed: int = 0,
    text: Data | Texts | str | None = None,
    allow_lossy: bool = False,
    **settings: Any,
) -> tuple[Model, Certificate]:
    """Turn a dense model into a mixture of experts that computes the same.

    `settings` are those of a phase that upcycles: every, granularity, shared, router_init, noise, drop and so on. For
    `router_init="centroids"`, give the `text` whose states are clustered. Returns the model and the certificate: how
    far its logits and its loss are from those before. Raises `Error` where it is not lossless, unless `allow_lossy` or
    where noise or drop make it so on purpose; InputError where the settings do not fit the model.
    """
    from mlx_moe.training.centroids import centroid_routers, centroid_tokens
    from mlx_moe.transfer.upcycling import ZERO_ROUTER_WARNING

    known = [name for name in UpcyclePhaseConfig.model_fields if name not in TrainPhaseConfig.model_fields]
    _check_known(settings, known, "setting", "upcycle")
    phase = validate(UpcyclePhaseConfig, {"n_experts": n_experts, "top_k": top_k, **settings})
    if (phase.router_init == "centroids") != (text is not None):
        raise InputError("router_init='centroids' and text go together: the model's states on a text are clustered")
    if phase.router_init == "zero":
        warnings.warn(ZERO_ROUTER_WARNING, stacklevel=2)
    routers = None
    if text is not None:
        data = _data_for(model, text)
        _check_ids(data.train, model.config.vocab_size)
        tokens_BT = _windows(data, centroid_tokens(phase), model.config.context_length)
        streamed = model._backend.streamed(model.config, model.weights(), model._device)
        routers = centroid_routers(streamed, phase, tokens_BT, seed)
    return _transfer(model, "upcycle", phase, seed, routers, allow_lossy)


@checked()
def grow(
    model: Model,
    d_model: int | None = None,
    n_layers: int | None = None,
    *,
    n_heads: int | None = None,
    d_ff: int | None = None,
    split: str = "uneven",
    seed: int = 0,
    allow_lossy: bool = False,
) -> tuple[Model, Certificate]:
    """Make a model wider and deeper; it computes the same.

    A size that is left out stays as it is; heads and FFN grow with the width. `split`: uneven or even shares for
    copies; even ones stay equal for ever. Returns the model and the certificate. Raises `Error` where it is not
    lossless, unless `allow_lossy`; InputError where growth to that size is not exact.
    """
    sizes = {
        "d_model": model.config.d_model if d_model is None else d_model,
        "n_layers": model.config.n_layers if n_layers is None else n_layers,
    }
    phase = validate(GrowPhaseConfig, {**sizes, "n_heads": n_heads, "d_ff": d_ff, "split": split})
    return _transfer(model, "grow", phase, seed, None, allow_lossy)


@checked("data")
def train(
    model: Model,
    data: Data | Texts | str | ArrayLike,
    steps: int,
    *,
    learning_rate: float = 3e-4,
    batch_size: int = 8,
    seed: int = 0,
    log_every: int = 10,
    overrides: Mapping[str, Any] | None = None,
    on_step: Callable[[Row], object] | None = None,
    out: str | Path | None = None,
) -> TrainResult:
    """Train a model for some steps.

    `data` is what `tokens` returns or takes. `overrides` set anything else that a run's config has, such as
    `{"optimizer.name": "muon", "engine.precision": "bf16", "phases.train.warmup_steps": 20}`. `on_step` gets the
    metrics of every logged step. With `out`, a folder, it is a run there, with checkpoints, that the commands read and
    resume; without it nothing is written, but for the token cache of a named source. Ctrl-C finishes the step and
    returns. Raises InputError for settings or tokens that do not fit the model, `Error` where the loss is no longer
    finite.
    """
    data = _data_for(model, data)
    for name, split in (("train", data.train), ("validation", data.validation)):
        _check_ids(split, model.config.vocab_size)
        check_length(split, model.config.context_length, name)  # type: ignore[arg-type]
    every = max(1, steps)  # once, at the end
    settings = {
        "seed": seed,
        "phases": {"train": {"steps": steps, "learning_rate": learning_rate}},
        "training": {"batch_size": batch_size, "log_every": log_every, "eval_every": every, "checkpoint_every": every},
    }
    run = _run_config(model, data, settings, overrides or {})
    console = _StepConsole(on_step)
    if out is None and (run.lora.rank or run.training.tracker != "none"):
        raise InputError("adapters (lora.rank) and training.tracker need a run in a folder; name it with out=")
    if out is not None:
        return _train_in_folder(model, data, run, Path(out), console)
    trainer = model._backend.trainer(run.model, model.weights(), run.optimizer, model._device, run.engine)
    log, is_interrupted = MemoryLog(), False
    with _interruptions() as interruption:
        session = Session(run, data, model._backend, log, console, interruption)
        try:
            train_phase(session, get_phase(run, 1), trainer, 0)
        except TrainingStopped:
            if interruption.number is None:
                raise
            is_interrupted = True
    n_done = max((row["step"] for row in log.rows), default=0)
    return TrainResult(model._next(trainer, f"trained for {n_done:,} steps"), log.rows, None, is_interrupted)


@checked("overrides")
def run(
    preset: str | None = None,
    *,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    out: str | Path | None = None,
    **options: Any,
) -> RunResult:
    """Train the phases of a run in a folder, as `mlxmoe train` does. Without a `preset` it is three-phase.

    `overrides` are config keys with their values, such as `{"phases.dense.steps": 50}`. `options` are those of
    `mlx_moe.training.request.RunRequest`: phases, source, data, tokenizer, steps, seed, backend, device, resume and so
    on. Raises InputError for a wrong setting, `Error` where the run stopped before its end.
    """
    from mlx_moe.training.request import RunRequest
    from mlx_moe.training.run import train_run

    known = [name for name in RunRequest.__dataclass_fields__ if name not in ("preset", "overrides", "out")]
    _check_known(options, known, "option", "run")
    words = as_overrides(overrides) if isinstance(overrides, Mapping) else _as_list(overrides, "overrides")
    if isinstance(phases := options.get("phases"), int | Sequence) and not isinstance(phases, str):
        options["phases"] = ",".join(map(str, phases if isinstance(phases, Sequence) else [phases]))
    for name in ("source", "data", "tokenizer"):
        options |= {name: str(options[name])} if isinstance(options.get(name), Path) else {}
    request = validate(RunRequest, {"preset": preset, "overrides": words, "out": out, **options})
    folder = train_run(request)
    return RunResult(folder, _rows(folder, "metrics.jsonl"), _rows(folder, "history.jsonl"))


@checked()
def generate(model: Model, tokenizer: Tokenizer | None, prompt: str, max_new_tokens: int = 100, **sampling: Any) -> str:
    """Continue a text, and return it with what follows.

    `sampling`: temperature (0 takes the likeliest token), top_k, top_p, min_p, repetition_penalty and seed. Raises
    InputError for a prompt that gives no token, and for sampling out of range.
    """
    return "".join(stream(model, tokenizer, prompt, max_new_tokens, **sampling))


@checked()
def stream(
    model: Model, tokenizer: Tokenizer | None, prompt: str, max_new_tokens: int = 100, **sampling: Any
) -> Iterator[str]:
    """Yield a prompt and what follows it, piece by piece, as `generate` returns it."""
    from mlx_moe.inference.decoding import stream_generate
    from mlx_moe.inference.sampling import Sampling

    tokenizer = model._tokenizer(tokenizer)
    _check_known(sampling, list(Sampling.__dataclass_fields__), "option", "sampling")
    if not 0 <= max_new_tokens <= MAX_NEW_TOKENS:
        raise InputError(f"max_new_tokens = {max_new_tokens}: must be from 0 to {MAX_NEW_TOKENS:,}")
    pieces = stream_generate(model._trainer, tokenizer, prompt, max_new_tokens, validate(Sampling, sampling))
    yield from chain([prompt], pieces)


@checked("source")
def evaluate(model: Model, source: Texts | str | Path, *, max_bytes: int = 250_000) -> dict[str, float]:
    """Return loss (nats per token), perplexity and bits per byte of a model on text, and the tokens that they are over.

    `source` is a list of texts, all of which count, or a named source or path, of which the held-out documents count up
    to `max_bytes`. Raises InputError where the text cannot be had, or the model has no tokenizer.
    """
    from mlx_moe.analysis.evaluation import Subset, pinned, score, summary

    tokenizer = model._tokenizer()
    if max_bytes < 1:
        raise InputError(f"max_bytes = {max_bytes}: must be at least 1")
    if isinstance(source, str | Path):
        subset = pinned(validate(DataConfig, {"source": str(source), "n_documents": None}), max_bytes)
    else:
        texts = _as_list(source, "source")
        for number, text in enumerate(texts):
            check_text(text, f"source[{number}]")
        if not any(texts):
            raise InputError(f"source = {quoted(texts)}: there is no text in it; give some")
        subset = Subset(texts)
    nats, tokens_N = score(model._trainer, tokenizer, subset)
    return summary(nats, len(tokens_N), subset)


@checked()
def parity(model: Model, *, seed: int = 0) -> ModelComparison:
    """Compare both backends on a model's weights with a float64 model in NumPy. `passed` is the verdict.

    Raises InputError where a weight holds NaN or Inf.
    """
    from parity.compare import compare_model

    return compare_model(model.config, model._finite_weights(), seed)


@checked()
def save(model: Model, folder: str | Path, format: str | None = None) -> Path:
    """Write a model into a folder that does not exist, and return the folder.

    Without a `format` it is a checkpoint. With `auto`, or llama, mixtral, gpt2 and others, it is a folder that
    transformers and mlx-lm open. Raises InputError where the folder exists or the format cannot hold the model.
    """
    from mlx_moe.hub.export import export

    target = absolute(Path(folder))
    with ExitStack() as stack:
        tokenizer = None
        if model.tokenizer is not None:
            tokenizer = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mlxmoe-")))
            model.tokenizer.save(tokenizer)
        source = model._checkpoint(tokenizer or target)
        if format is not None:
            export(source, target, format)
            return target
        partial = stack.enter_context(creating(target))
        checkpoint.fill(partial, source.config, source.state, lambda name: [source.weights[name]], tokenizer)
    return target


class _StepConsole(Console):
    """Calls a function with the metrics of every logged step, and prints nothing."""

    def __init__(self, on_step: Callable[[Row], object] | None):
        super().__init__(quiet=True)
        self._on_step = on_step

    def step(self, row: Row, n_steps: int) -> None:
        if self._on_step is not None:
            self._on_step(dict(row))


def _interruptions() -> Any:
    """Note Ctrl-C while a step is at work; signals reach the main thread alone."""
    in_main = threading.current_thread() is threading.main_thread()
    return interruptions() if in_main else nullcontext(Interruption())


def _transfer(
    model: Model, kind: str, phase: PhaseConfig, seed: int, routers: Any, allow_lossy: bool
) -> tuple[Model, Certificate]:
    from mlx_moe.convert.probes import probe_tokens

    transfer, limits = TRANSFERS[kind], VerificationConfig()
    plan = transfer.plan(model.config, phase, seed, routers)
    after = model._trainer.apply_transfer(plan)
    probes_BT1 = probe_tokens(model.config, model.tokenizer, limits.probe_sequences)
    certificate = certify(limits, model._trainer, after, probes_BT1, widened=True)
    if not (certificate.passed or allow_lossy or plan.is_lossy):
        raise ChangedModel(certificate)
    return model._next(after, became(transfer, after.config)), certificate


def _check_known(given: Mapping[str, Any], known: Sequence[str], noun: str, owner: str) -> None:
    """Raise InputError for a keyword that its owner does not know."""
    if unknown := sorted(given.keys() - set(known)):
        raise InputError(f"unknown {noun} {quoted(unknown[0])} of {owner}; known here: {', '.join(known)}")


def _check_weights(config: ModelConfig, weights: Weights) -> None:
    """Raise InputError unless weights in memory have a config's names and shapes."""
    if not isinstance(weights, Mapping):
        raise InputError(f"weights = {quoted(weights)}: give arrays by name, as model.weights() returns them")
    expected = shapes(config)
    if unlike := sorted(expected.keys() ^ weights.keys()):
        what = "lack" if unlike[0] in expected else "have"
        raise InputError(
            f"the weights {what} {quoted(unlike[0])} ({len(unlike)} such), unlike the config; change values of weights "
            "only, or make another config"
        )
    for name, shape in expected.items() if isinstance(weights, dict) else ():
        if np.shape(weights[name]) != shape:
            raise InputError(f"{name} has shape {np.shape(weights[name])}; the config asks for {shape}")


def _data_for(model: Model, source: Any) -> Data:
    if isinstance(source, Data):
        return source
    source = source if isinstance(source, str | Path | Sequence | np.ndarray) else _as_list(source)
    is_text = isinstance(source, str | Path) or (len(source) and isinstance(source[0], str))
    if is_text and model.tokenizer is None:
        raise InputError(NO_TOKENIZER)
    return tokens(source, model.tokenizer)


def _as_list(source: Any, name: str = "data") -> list[Any]:
    if not isinstance(source, Iterable):
        raise InputError(f"{name} = {quoted(source)}: give texts, a named source, or what else {name} may be")
    return list(source)


def _named_source(
    source: str, tokenizer: Tokenizer | str | None, fraction: float, n_documents: int | None, text_field: str
) -> Data:
    with ExitStack() as stack:
        spec = tokenizer
        if isinstance(tokenizer, Tokenizer):
            spec = stack.enter_context(tempfile.TemporaryDirectory(prefix="mlxmoe-"))
            tokenizer.save(Path(spec))
        values: dict[str, Any] = {"source": source, "n_documents": n_documents, "text_field": text_field}
        values |= {"validation_fraction": fraction} | ({} if spec is None else {"tokenizer": spec})
        if n_documents is None and source in ("stories", "tinystories"):
            del values["n_documents"]
        config = validate(DataConfig, values)
        found = prepare(config)
    return Data(found.train, found.validation, found.tokenizer, config, validation_fraction=fraction)


def _of_texts(texts: Texts, spec: Tokenizer | str | None, fraction: float) -> Data:
    """Encode documents, each with an end of text; those are held out whose hash says so, or the last tokens."""
    if spec is None:
        raise InputError("texts need a tokenizer: char, bpe:VOCAB, or the name or folder of one of Hugging Face's")
    for number, text in enumerate(texts):
        check_text(text, f"texts[{number}]")
    tokenizer = spec if isinstance(spec, Tokenizer) else make_tokenizer(spec, lambda: iter(texts))
    splits: dict[bool, list[int]] = {False: [], True: []}
    for text, ids in zip(texts, tokenizer.encode_batch(list(texts)), strict=True):
        splits[is_held_out(text.encode(), fraction)] += [*ids, tokenizer.eot_id]
    if not splits[False] or not splits[True]:
        whole = splits[False] + splits[True]
        n_held = min(max(1, round(len(whole) * fraction)), len(whole) - 1)
        splits = {False: whole[:-n_held], True: whole[-n_held:]}
    train_N, validation_N = (np.array(splits[is_held], np.uint32) for is_held in (False, True))
    return Data(train_N, validation_N, tokenizer, texts=texts, validation_fraction=fraction)


def _as_ids(items: Any) -> NDArray[np.uint32]:
    if isinstance(items, list) and items and all(np.ndim(item) == 1 for item in items):
        items = np.concatenate([_integers(item) for item in items])
    ids = _integers(items)
    if ids.ndim != 1 or len(ids) < 2:
        raise InputError(f"tokens of shape {ids.shape}; give at least 2 in one dimension, or a list of documents")
    if ids.min() < 0 or ids.max() >= MAX_VOCAB_SIZE:
        bad = int(ids.min() if ids.min() < 0 else ids.max())
        raise InputError(f"token {bad} is no id; they are from 0 to {MAX_VOCAB_SIZE - 1:,}")
    return ids.astype(np.uint32)


def _integers(tokens: Any) -> NDArray[Any]:
    """Return tokens as an array of integers, or raise InputError."""
    try:
        array = np.asarray(tokens)
    except (ValueError, OverflowError):  # lists of different lengths
        array = np.asarray(None)
    if array.dtype.kind not in "iu":
        raise InputError(
            f"tokens = {quoted(tokens)}: give a list of texts, a named source, or token ids as integers, in a list or "
            "an array"
        )
    return array


def _check_room(config: ModelConfig) -> None:
    """Raise InputError where a model's weights, drawn and then copied, are more than the memory of the machine."""
    needed, memory = 8 * count_parameters(config).total, installed_bytes()
    if needed > memory:
        raise InputError(
            f"{count_parameters(config).total / 1e6:,.0f} M parameters need {needed / 1e9:.1f} GB to be drawn and "
            f"built, and this machine has {memory / 1e9:.1f} GB; make the model smaller"
        )


def _check_ids(ids: Any, vocab_size: int) -> None:
    """Raise InputError where token ids, in memory or on disk, are not in a vocabulary."""
    for start in range(0, len(ids), IDS_AT_A_TIME):
        block = np.asarray(ids[start : start + IDS_AT_A_TIME])
        bad = int(block.min()) if block.min() < 0 else int(block.max())
        if not 0 <= bad < vocab_size:
            raise InputError(
                f"token {bad} is not in the model's vocabulary of {vocab_size}; take the model's own tokenizer"
            )


def _windows(data: Data, n_tokens: int, context_length: int) -> NDArray[np.int32]:
    from mlx_moe.data.tokens import fixed_windows

    if len(data.train) < 2:
        raise InputError(f"the text gives {len(data.train)} tokens; give at least 2")
    width = min(context_length, len(data.train) - 1)
    return fixed_windows(data.train, -(-n_tokens // width), width)[:, :-1]


def _run_config(model: Model, data: Data, settings: Mapping[str, Any], overrides: Mapping[str, Any]) -> RunConfig:
    for key in overrides:
        section, _, rest = str(key).partition(".")
        if section in ("model", "data", "start", "name", "seed") or (
            section == "phases" and not rest.startswith("train.")
        ):
            raise InputError(
                f"overrides {quoted(str(key))}: train takes the model and the data as they are, has one phase, "
                "phases.train, and a seed of its own; leave it out"
            )
    values = {
        "name": "python",
        "start": {"model": "python", "phases": [1], "lineage": list(model.lineage)},
        "model": model.config.model_dump(mode="json"),
        "data": data.source.model_dump(mode="json") if data.source else {"fit_vocabulary": False},
        **settings,
    }
    return validate(RunConfig, override(values, as_overrides(overrides)))


def _train_in_folder(model: Model, data: Data, run: RunConfig, out: Path, console: Console) -> TrainResult:
    """Train as a run of one phase, in a folder that resumes: with its text, its tokenizer and the model it starts
    from."""
    from mlx_moe.storage.run_folder import TOKENIZER, check_new
    from mlx_moe.training.request import Options
    from mlx_moe.training.run import train_phases
    from mlx_moe.training.trackers import check_installed

    folder = absolute(out)
    check_new(folder)
    check_installed(run.training.tracker)
    tokenizer = data.tokenizer or model.tokenizer
    if tokenizer is None or (data.source is None and data.texts is None):
        raise InputError(
            "a run in a folder can be resumed, so it needs its text and tokenizer: give texts or a named source, or "
            f"leave out={quoted(str(out))} out and save the result"
        )
    texts = {"source": str(folder / "texts.jsonl"), "n_documents": None}
    source = data.source or validate(DataConfig, texts | {"validation_fraction": data.validation_fraction})
    start = checkpoint.folder(folder, get_phase(run, 1).folder, 0)
    config = source.model_copy(update={"tokenizer": str(folder / TOKENIZER), "fit_vocabulary": False})
    assert run.start is not None
    begun = run.start.model_copy(update={"model": str(start)})
    run = run.model_copy(update={"name": folder.name, "data": config, "start": begun})
    make_folder(folder)
    if data.texts is not None:
        _write_texts(folder / "texts.jsonl", data.texts)
    tokenizer.save(folder / TOKENIZER)
    options = Options(model._device, open_model=model._checkpoint, saves_start=True)
    is_interrupted = False
    try:
        train_phases(run, folder, model._backend, 1, options, console)
    except TrainingStopped as stopped:
        if stopped.exit_code < 128:
            raise
        is_interrupted = True
    trained, _ = load(folder, model.backend, model._device)
    return TrainResult(trained, _rows(folder, "metrics.jsonl"), folder, is_interrupted)


def _write_texts(file: Path, texts: Texts) -> None:
    import json

    with replacing(file) as partial:
        partial.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def _rows(folder: Path, name: str) -> list[Row]:
    from mlx_moe.storage import jsonl

    return jsonl.read(folder / name)
