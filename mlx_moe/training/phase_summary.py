"""Results of phases and runs: figures, text samples, the final table."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from mlx_moe.accounting import count_parameters
from mlx_moe.config import RunConfig
from mlx_moe.data.tokens import TokenData, fixed_windows
from mlx_moe.inference.decoding import generate_text
from mlx_moe.phases import get_phase
from mlx_moe.storage import checkpoint
from mlx_moe.storage.run_folder import RunFolder
from mlx_moe.training.backend import Trainer
from mlx_moe.training.console import Console
from mlx_moe.training.loop import load_imbalance

PROMPTS = (
    "Once upon a time, there was a little",
    "One day, a girl named Lily went to",
    "The dog was very happy because",
)
SAMPLE_TOKENS = 40


@dataclass(frozen=True)
class PhaseResult:
    """Losses are mean cross entropies in nats per token; the training losses are of single batches.

    None replaces values that the log has lost.
    """

    first_loss: float | None
    last_loss: float | None
    first_validation_loss: float | None
    last_validation_loss: float | None
    tokens: int
    seconds: float


def phase_result(metrics: list[dict[str, Any]], phase: int, step: int) -> PhaseResult:
    """Summarise a phase of `step` steps from the rows of `metrics.jsonl`."""
    rows = [row for row in metrics if row["phase"] == phase]

    def ends(name: str) -> tuple[float | None, float | None]:
        values = [row[name] for row in rows if row.get(name) is not None]
        is_whole = bool(values) and rows[0]["step"] == 0
        return values[0] if is_whole else None, rows[-1].get(name) if rows and rows[-1]["step"] == step else None

    losses, validations = ends("cross_entropy"), ends("validation_loss")
    return PhaseResult(
        first_loss=losses[0],
        last_loss=losses[1],
        first_validation_loss=validations[0],
        last_validation_loss=validations[1],
        tokens=max((row.get("tokens", 0) for row in rows), default=0),
        seconds=sum(
            (row.get("step_ms") or 0) * max(0, row["step"] - earlier["step"]) for earlier, row in pairwise(rows)
        )
        / 1e3,
    )


def describe_model(trainer: Trainer, data: TokenData, n_sequences: int) -> dict[str, Any]:
    """Return a phase's model for its row in `history.jsonl`: its size, its experts' load and what it writes."""
    row: dict[str, Any] = {"parameters": count_parameters(trainer.config).to_json()}
    probes = fixed_windows(data.validation, n_sequences, trainer.config.context_length)
    expert_load_LE = trainer.expert_load(probes[:, :-1])
    if expert_load_LE is not None:
        row["validation_expert_load"] = expert_load_LE.tolist()
        row["load_imbalance"] = load_imbalance(expert_load_LE)
        row["dead_experts"] = int((expert_load_LE == 0).sum())
    row["samples"] = {prompt: generate_text(trainer, data.tokenizer, prompt, SAMPLE_TOKENS) for prompt in PROMPTS}
    return row


def report_phase(run: RunConfig, row: dict[str, Any], folder: RunFolder, console: Console) -> None:
    """Print the row of a finished phase, and write it to `history.jsonl` and `samples.md`."""
    summary = [
        ("loss", _fall(row["first_loss"], row["last_loss"])),
        ("validation", _fall(row["first_validation_loss"], row["last_validation_loss"])),
        ("tokens", f"{row['tokens']:,} in {row['seconds']:.0f} s of steps"),
    ]
    if "load_imbalance" in row:
        summary.append(
            ("expert load", f"max/mean {row['load_imbalance']:.2f} in the worst layer, {row['dead_experts']} dead")
        )
    console.title(f"{get_phase(run, row['phase']).title}, results")
    console.summary(summary)
    for prompt, continuation in row["samples"].items():
        console.line(f"  {prompt}{continuation}".replace("\n", " "))
    # The row comes last: without it, a resumed run reports the phase again.
    folder.save_samples(_samples_as_markdown(run, [*folder.history(), row]))
    folder.log_event(row)


def summarize(run: RunConfig, folder: RunFolder, console: Console) -> None:
    """Print the table of all phases and boundaries so far, and the location of the best checkpoint."""
    history = folder.history()
    console.title("Summary")
    boundaries = [row for row in history if row["event"] == "boundary"]
    if boundaries:
        console.table(
            ["boundary", "max |Δlogit|", "last loss before", "first loss after", "jump", "verdict"],
            [
                [
                    f"{row['phase'] - 1}-{row['phase']}",
                    _figure(row["max_logit_difference"], ".1e"),
                    _figure(row["loss_before"], ".5f"),
                    _figure(row["loss_after"], ".5f"),
                    _figure(row["loss_jump"], "+.1e"),
                    "lossless" if row["passed"] else "lossy",
                ]
                for row in boundaries
            ],
        )
    console.table(
        ["phase", "parameters", "first loss", "last loss", "drop", "validation", "drop"],
        [
            [
                get_phase(run, row["phase"]).folder,
                f"{row['parameters']['total'] / 1e6:,.2f} M",
                _figure(row["first_loss"], ".4f"),
                _figure(row["last_loss"], ".4f"),
                _figure(_drop(row["first_loss"], row["last_loss"]), ".4f"),
                _figure(row["last_validation_loss"], ".4f"),
                _figure(_drop(row["first_validation_loss"], row["last_validation_loss"]), ".4f"),
            ]
            for row in history
            if row["event"] == "phase"
        ],
    )
    console.line(f"everything is in {folder.path}")
    if (best := checkpoint.best(folder.path)) is not None:
        loss = checkpoint.best_validation_loss(folder.path)
        console.line(
            f"lowest validation loss {loss:.4f}: {best.relative_to(folder.path)}; also available as {folder.path}/best"
        )


def _fall(first: float | None, last: float | None) -> str:
    return f"{_figure(first, '.4f')} -> {_figure(last, '.4f')} (drop {_figure(_drop(first, last), '.4f')})"


def _drop(first: float | None, last: float | None) -> float | None:
    return None if first is None or last is None else first - last


def _figure(value: float | None, form: str) -> str:
    return "—" if value is None else format(value, form)


def _samples_as_markdown(run: RunConfig, history: list[dict[str, Any]]) -> str:
    return "".join(
        f"## {get_phase(run, row['phase']).title}\n\n"
        + "".join(f"**{prompt}**{continuation}\n\n" for prompt, continuation in row["samples"].items())
        for row in history
        if row["event"] == "phase"
    )
