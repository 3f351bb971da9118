"""Every checkpoint on the same held-out text: loss, perplexity, bits per byte, and what it writes.

B batch, T context length.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_moe.accounting import count_parameters
from mlx_moe.analysis.run_reader import read_run_config
from mlx_moe.config import DataConfig
from mlx_moe.data.tokenizers import Tokenizer
from mlx_moe.data.tokens import held_out
from mlx_moe.errors import InputError
from mlx_moe.hub.models import check_place, is_model_folder, open_model
from mlx_moe.inference.decoding import generate_text, load_tokenizer
from mlx_moe.inference.sampling import Sampling
from mlx_moe.storage import checkpoint
from mlx_moe.storage.atomic import writing
from mlx_moe.storage.checkpoint import Checkpoint
from mlx_moe.storage.run_folder import CONFIG, resume_command
from mlx_moe.terminal import echo
from mlx_moe.training.backend import Backend, Trainer
from mlx_moe.training.console import Console
from mlx_moe.training.phase_summary import PROMPTS
from mlx_moe.training.run import open_run
from mlx_moe.validation import validate

RESULTS, GENERATIONS = "evaluation_results.csv", "generations.md"
TEMPERATURES = (0.0, 0.8)
TOKENS_PER_BATCH = 4096


@dataclass(frozen=True)
class Subset:
    """First documents of the validation split, as text: the same for every tokenizer."""

    documents: list[str]

    @property
    def bytes(self) -> int:
        return sum(len(text.encode()) for text in self.documents)

    @property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for text in self.documents:
            digest.update(len(text.encode()).to_bytes(8) + text.encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class Evaluation:
    """`loss` in nats per token, over `tokens`; `bits_per_byte` over the subset's `text_bytes` of UTF-8.

    Of the tokens, `unknown_tokens` stand for text that the tokenizer has no token for.
    """

    checkpoint: str
    phase: int
    step: int
    architecture: str
    parameters_total: int
    parameters_active: int
    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    unknown_tokens: int
    text_documents: int
    text_bytes: int
    text_sha256: str
    context_length: int
    backend: str
    device: str


@dataclass(frozen=True)
class EvaluationOptions:
    """`max_bytes`: of the subset; `new_tokens`: of every generation, 0 for none."""

    data: str | None = None
    text_field: str = "text"
    max_bytes: int = 250_000
    prompts: Sequence[str] = PROMPTS
    new_tokens: int = 60
    device: str = "auto"


def evaluate(path: Path, backend: Backend, options: EvaluationOptions, console: Console) -> list[Evaluation]:
    """Evaluate a run's every checkpoint, or the one checkpoint or Hugging Face model that a path means.

    In a run's folder, `evaluation_results.csv` and `generations.md` take the place of earlier ones. A checkpoint that
    a run deletes meanwhile, because it trains, is left out with a warning. Raises InputError where the data or a
    tokenizer that fits is missing, or a checkpoint is damaged.
    """
    is_run = (path / CONFIG).is_file()
    evaluations, generations, subset = [], [], None
    for folder in find_checkpoints(path):
        try:
            loaded = checkpoint.load_listed(folder) if is_run else open_model(folder)
        except checkpoint.Pruned as error:
            if not is_run:
                raise
            echo(f"warning: {error}; it was left out", err=True)
            continue
        tokenizer = load_tokenizer(loaded)
        if subset is None:
            subset = pinned(_data_config(loaded, options), options.max_bytes)
        trainer = backend.trainer(loaded.config, loaded.weights, device=options.device)
        name = str(folder.relative_to(path)) if is_run else str(folder)
        evaluation = _evaluation(name, loaded, trainer, tokenizer, subset, backend)
        evaluations.append(evaluation)
        if evaluation.unknown_tokens:
            echo(f"warning: {name}: {_unknown(evaluation)}", err=True)
        console.line(_line(evaluation))
        if options.new_tokens:
            written = _generations(trainer, tokenizer, options)
            generations.append(f"## {evaluation.checkpoint}\n\n{written}")
    if is_run:
        _write(path / RESULTS, as_csv(evaluations))
        if generations:
            _write(path / GENERATIONS, "".join(generations))
    else:
        for text in generations:
            console.line(text)
    return evaluations


def check(path: Path, options: EvaluationOptions) -> None:
    """Raise InputError where there is no model at a path, or none whose data is known."""
    found = find_checkpoints(path)
    if options.data is None:
        _run_of(found[0])


def find_checkpoints(path: Path) -> list[Path]:
    """Return all checkpoints of a run, or the one model that a path means. Raises InputError where there is none."""
    if (path / CONFIG).is_file():
        read_run_config(path)
        if not (found := list(checkpoint.complete_in(path))):
            raise InputError(f"{path} has no checkpoint yet; train on: {resume_command(path)}")
        return found
    check_place(path)
    if not is_model_folder(path):
        checkpoint.resolve(path)
    return [path]


def pinned(config: DataConfig, max_bytes: int) -> Subset:
    """Return the first documents of the validation split, at most `max_bytes`; the last document is cut to fit.

    Raises InputError where nothing is held out.
    """
    documents, left = [], max_bytes
    for text in held_out(config):
        utf8 = text.encode()[:left]
        documents.append(utf8.decode(errors="ignore"))
        left -= len(utf8)
        if left <= 0:
            break
    if not documents:
        raise InputError(f"{config.source!r} is too short to evaluate on: nothing of it is held out; give it more text")
    return Subset(documents)


def score(trainer: Trainer, tokenizer: Tokenizer, subset: Subset) -> tuple[float, NDArray[np.int32]]:
    """Return the total loss of a subset in nats and its tokens (N,), each predicted once, ends of documents included.

    The text goes through in stretches of the context's length; the first follows an end of text.
    """
    ids = [tokenizer.eot_id]
    for text in subset.documents:
        ids += [*tokenizer.encode(text), tokenizer.eot_id]
    nats = 0.0
    for windows_BT1 in _stretches(np.array(ids, np.int32), trainer.config.context_length):
        nats += trainer.loss(windows_BT1) * (windows_BT1.size - len(windows_BT1))
    return nats, np.array(ids[1:], np.int32)


def summary(nats: float, n_tokens: int, subset: Subset) -> dict[str, float]:
    """Return loss (nats per token), perplexity, bits per byte of UTF-8, and the tokens that they are over."""
    return {
        "loss": nats / n_tokens,
        "perplexity": math.exp(min(nats / n_tokens, 700)),
        "bits_per_byte": nats / subset.bytes / math.log(2),
        "tokens": n_tokens,
    }


def as_csv(evaluations: Sequence[Evaluation]) -> str:
    table = io.StringIO()
    writer = csv.DictWriter(table, list(Evaluation.__dataclass_fields__), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(evaluation) for evaluation in evaluations)
    return table.getvalue()


def _stretches(ids: NDArray[np.int32], context_length: int) -> Iterator[NDArray[np.int32]]:
    """Yield windows (B, T + 1), each beginning with the last token of the one before; the last window is shorter."""
    n_whole = (len(ids) - 1) // context_length
    starts = np.arange(n_whole) * context_length
    windows = ids[starts[:, None] + np.arange(context_length + 1)]
    size = max(1, TOKENS_PER_BATCH // context_length)
    yield from (windows[start : start + size] for start in range(0, n_whole, size))
    if len(rest := ids[n_whole * context_length :]) > 1:
        yield rest[None]


def _evaluation(
    name: str, loaded: Checkpoint, trainer: Trainer, tokenizer: Tokenizer, subset: Subset, backend: Backend
) -> Evaluation:
    nats, tokens_N = score(trainer, tokenizer, subset)
    tokens = len(tokens_N)
    count, figures = count_parameters(loaded.config), summary(nats, tokens, subset)
    return Evaluation(
        checkpoint=name,
        phase=loaded.state.phase,
        step=loaded.state.step,
        architecture=loaded.config.display_name,
        parameters_total=count.total,
        parameters_active=count.active,
        loss=figures["loss"],
        perplexity=figures["perplexity"],
        bits_per_byte=figures["bits_per_byte"],
        tokens=tokens,
        unknown_tokens=0 if tokenizer.unknown_id is None else int((tokens_N == tokenizer.unknown_id).sum()),
        text_documents=len(subset.documents),
        text_bytes=subset.bytes,
        text_sha256=subset.sha256,
        context_length=loaded.config.context_length,
        backend=backend.name,
        device=trainer.device.label,
    )


def _data_config(loaded: Checkpoint, options: EvaluationOptions) -> DataConfig:
    """Return the config of the run's data, or of `--data`: all of it, the model's tokenizer for a split by token."""
    if options.data is not None:
        fields: dict[str, Any] = {"source": options.data, "text_field": options.text_field, "n_documents": None}
        return validate(DataConfig, fields | {"tokenizer": str(loaded.tokenizer_folder)})
    return open_run(_run_of(loaded.path)).data


def _run_of(path: Path) -> Path:
    """Return the folder of a checkpoint's run. Raises InputError for a checkpoint outside a run."""
    for parent in path.resolve().parents:
        if (parent / CONFIG).is_file():
            return parent
    raise InputError(f"{path} is not in a run's folder, so its data is not known; name some with --data")


def _generations(trainer: Trainer, tokenizer: Tokenizer, options: EvaluationOptions) -> str:
    """Return Markdown: each prompt continued at each temperature, with seed 0."""
    parts = []
    for temperature in TEMPERATURES:
        parts.append("### Greedy\n\n" if temperature == 0 else f"### Temperature {temperature}\n\n")
        for prompt in options.prompts:
            sampling = Sampling(temperature=temperature)
            continuation = generate_text(trainer, tokenizer, prompt, options.new_tokens, sampling)
            parts.append(f"**{prompt}**{continuation}\n\n")
    return "".join(parts)


def _line(evaluation: Evaluation) -> str:
    return (
        f"{evaluation.checkpoint}: loss {evaluation.loss:.4f}, perplexity {evaluation.perplexity:.2f}, "
        f"{evaluation.bits_per_byte:.4f} bits per byte"
    )


def _unknown(evaluation: Evaluation) -> str:
    share = evaluation.unknown_tokens / evaluation.tokens
    return (
        f"{100 * share:.2g} % of the tokens stand for text that its tokenizer does not know, whose bytes are counted "
        "and never predicted: its bits per byte are too low to compare with another tokenizer's"
    )


def _write(file: Path, text: str) -> None:
    with writing(file, file.name, "eval", is_own_place=True, remedy="make its folder writable") as partial:
        partial.write_text(text, encoding="utf-8")
