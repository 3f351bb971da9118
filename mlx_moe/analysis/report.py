"""HTML page about a run, readable in a browser without a network. Its template and code are in `page/`."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mlx_moe.analysis.comparison import nats_to_bits_per_byte
from mlx_moe.analysis.expert_table import SUMMARY_COLUMNS, SUMMARY_LEGEND, phase_folder, summary
from mlx_moe.analysis.run_reader import PhaseRecord, Row, RunRecord, read_record
from mlx_moe.html.render import render_page
from mlx_moe.phases import get_phase, lineage
from mlx_moe.storage.atomic import output_file, writing
from mlx_moe.storage.reading import read_text
from mlx_moe.storage.run_folder import CONFIG
from mlx_moe.training.console import millions

REPORT = "report.html"
PAGE = Path(__file__).parent / "page"
MOST_ROWS = 2000  # of a phase's curves
MOST_COLUMNS = 120  # of a load map
DECADES = (-10, 0)  # on the certificates' strips
CURVES = (
    *("cross_entropy", "validation_loss", "learning_rate", "grad_norm", "tokens_per_s", "mfu", "peak_memory_bytes"),
    *("load_imbalance", "router_entropy"),
)
PLACES = ("run_step", "run_tokens", "run_seconds")


def write_report(path: Path, out: Path, warn: Callable[[str], None] = lambda line: None) -> Path:
    """Write a run's page; `warn` gets a line for everything unreadable.

    Raises InputError if `path` is not a run, or `out` cannot be written.
    """
    record = read_record(path)
    for line in record.unread:
        warn(line)
    with writing(out, REPORT, "report") as partial:
        # a path may contain bytes that are not UTF-8
        partial.write_text(render(record), encoding="utf-8", errors="backslashreplace")
    return output_file(out, REPORT)


def render(record: RunRecord) -> str:
    """Return the page. Everything that comes from the run's folder is escaped."""
    return render_page(
        PAGE,
        "page.html",
        title=record.run.name,
        lede=_lede(record),
        missing=record.missing,
        unread=record.unread,
        tiles=_tiles(record),
        boundaries=[_boundary(record, name, values) for name, values in record.boundaries.items()],
        decades=[{"power": power, "at": _at(10.0**power)} for power in range(DECADES[0] + 2, DECADES[1], 2)],
        phase_columns=PHASE_COLUMNS,
        phase_rows=[_phase_row(phase) for phase in record.phases],
        has_experts=any(phase.model.moe for phase in record.phases),
        expert_columns=SUMMARY_COLUMNS,
        expert_rows=[summary(one) for one in record.experts["checkpoints"]] if record.experts else [],
        expert_legend=SUMMARY_LEGEND,
        samples=_samples(record),
        origin=_origin(record),
        config=read_text(record.path / CONFIG),
        data=_data(record),
    )


def _lede(record: RunRecord) -> str:
    last, environment = record.phases[-1].rows[-1], record.environment
    steps = [", ".join(lineage(record.run, record.run.first_phase)) or f"a {_size_of(record.phases[0])}"]
    steps += [_became(phase) for phase in record.phases[1:]]
    made_of = f" of {record.data['source']['description']}" if record.data else ""
    place = f", with {environment['backend']} on {environment['device']}" if environment else ""
    text = (
        f"{', '.join(steps)}. {last['run_step']:,} steps, {_count(last['run_tokens'])} tokens{made_of} in "
        f"{_duration(last['run_seconds'])}{place}."
    )
    if (diverged := record.phases[-1].diverged) is not None:
        text += f" It diverged at step {diverged['step']:,} of phase {diverged['phase']}: {diverged['reason']}."
    return text[0].upper() + text[1:]


def _size_of(phase: PhaseRecord) -> str:
    size = millions(phase.parameters.total)
    if phase.model.moe is None:
        return f"dense model of {size} parameters"
    return f"model of {phase.model.moe.n_experts} experts a layer ({size})"


def _became(phase: PhaseRecord) -> str:
    transfer, before = phase.phase.transfer, phase.model
    if transfer is None:
        return f"trained on as a {_size_of(phase)}"
    if transfer.gives_experts and before.moe is not None:
        return f"{transfer.participle} to {before.moe.n_experts} experts a layer ({millions(phase.parameters.total)})"
    return f"{transfer.participle} to {before.d_model} wide and {before.n_layers} deep"


def _tiles(record: RunRecord) -> list[dict[str, str]]:
    last = record.phases[-1]
    validations = [value for phase in record.phases for _, value in phase.column("validation_loss")]
    tiles = []
    if validations:
        note = f"nats per token, was {validations[0]:.3f}"
        tiles.append(_tile("Validation loss", f"{validations[-1]:.4f}", note))
        if (per_byte := nats_to_bits_per_byte(record.data)) is not None:
            tiles.append(_tile("Bits per byte", f"{validations[-1] * per_byte:.3f}", "of the held-out text"))
    active = f"{millions(last.parameters.active)} active per token"
    tiles.append(_tile("Parameters", millions(last.parameters.total), active))
    jumps = [values["loss_jump"] for values in record.boundaries.values()]
    if jumps:
        largest = max(jumps, key=lambda jump: math.inf if jump is None else abs(jump))
        tiles.append(_tile("Largest jump", _signed(largest), "of the loss at a boundary, nats per token"))
    return tiles


def _tile(name: str, value: str, note: str) -> dict[str, str]:
    return {"name": name, "value": value, "note": note}


def _boundary(record: RunRecord, name: str, values: Row) -> Row:
    before, after = name.split("-")
    transfer = get_phase(record.run, int(after)).transfer
    verdict = "lossless ✓" if values["passed"] else "changed the model ✗"
    limits = values["limit_logit_difference"], values["limit_loss_jump"]
    notes = []
    if values["argmax_agreement"] is not None:
        notes.append(f"Same likeliest token at {100 * values['argmax_agreement']:.2f} % of the positions.")
    if values["routing_flips"]:
        notes.append(
            f"{values['routing_flips']} routing ties were flipped by rounding ({_size(values['router_difference'])} in "
            "the router logits), so those sequences were judged with the same experts in both models; without, the "
            f"largest difference is {_size(values['free_logit_difference'])}."
        )
    if values["allowed_lossy"]:
        notes.append("Training continued because of --allow-lossy.")
    return {
        "title": f"{before} → {after}: {transfer.noun if transfer else 'none'}",
        "verdict": verdict,
        "passed": values["passed"],
        "loss_before": _loss(values["loss_before"]),
        "loss_after": _loss(values["loss_after"]),
        "strips": [
            _strip("max |Δlogit|", values["logit_differences"], _size(values["max_logit_difference"]), limits[0]),
            _strip("jump in loss", [values["loss_jump"]], _signed(values["loss_jump"]), limits[1]),
        ],
        "notes": notes,
    }


def _strip(name: str, values: list[float | None], value: str, limit: float) -> Row:
    dots = [{"at": _at(one), "value": _signed(one)} for one in values]
    return {"name": name, "value": value, "limit": f"{limit:g}", "limit_at": _at(limit), "dots": dots}


def _at(value: float | None) -> float:
    """Return a value's position on a strip, in percent; non-finite values are at the end."""
    if value is None:
        return 100.0
    low, high = DECADES
    power = math.log10(abs(value)) if value else low
    return round(100 * min(1.0, max(0.0, (power - low) / (high - low))), 2)


PHASE_COLUMNS = ["phase", "parameters", "active per token", "steps", "training loss", "validation loss", "time"]


def _phase_row(phase: PhaseRecord) -> Row:
    count = phase.parameters
    steps = f"{phase.steps:,}" if phase.steps == phase.planned_steps else f"{phase.steps:,} of {phase.planned_steps:,}"
    losses = [_first_to_last(phase, name) for name in ("cross_entropy", "validation_loss")]
    cells = [millions(count.total), millions(count.active), steps, *losses, _duration(phase.seconds)]
    return {"name": phase.name, "architecture": phase.model.display_name, "cells": cells}


def _first_to_last(phase: PhaseRecord, name: str) -> str:
    values = [value for _, value in phase.column(name)]
    return f"{values[0]:.4f} → {values[-1]:.4f}" if values else "–"


def _samples(record: RunRecord) -> list[Row]:
    """Return, for every prompt, the sample of each finished phase."""
    finished = [(phase.name, phase.event["samples"]) for phase in record.phases if phase.event]
    prompts = dict.fromkeys(prompt for _, texts in finished for prompt in texts)
    return [
        {
            "prompt": prompt,
            "texts": [
                {"phase": name, "text": texts[prompt].strip() or "(nothing)"}
                for name, texts in finished
                if prompt in texts
            ],
        }
        for prompt in prompts
    ]


def _origin(record: RunRecord) -> list[tuple[str, str]]:
    environment, data = record.environment, record.data
    origin = []
    if environment:
        versions = [f"{name} {version}" for name, version in environment["libraries"].items() if version]
        origin += [
            ("command", shlex.join(["mlxmoe", *environment["command"][1:]])),
            ("code", f"git {environment['git_sha']}" if environment["git_sha"] else "no git"),
            ("backend", f"{environment['backend_reason']}; {environment['device']}, {environment['precision']}"),
            ("libraries", ", ".join([f"Python {environment['python']}", *versions])),
            ("platform", environment["platform"]),
        ]
    if data:
        origin += [
            ("data", f"{data['source']['description']}, split {data['split']}"),
            *((name, f"{split['documents']:,} documents, {split['tokens']:,} tokens; SHA-256 {split['sha256']}")
              for name, split in (("trained on", data["train"]), ("held out", data["validation"]))),
            ("tokenizer", f"{data['tokenizer']['spec']}, {data['tokenizer']['vocab_size']:,} tokens"),
        ]  # fmt: skip
    return [*origin, ("seed", str(record.run.seed)), ("folder", str(record.path))]


def _data(record: RunRecord) -> Row:
    """Return the data of the page's curves and maps."""
    rows = [row for phase in record.phases for row in _thinned(phase.rows)]
    return {
        "phases": [
            {"number": phase.number, "name": phase.name, **{place: phase.rows[0][place] for place in PLACES}}
            for phase in record.phases
        ],
        "rows": {name: [_figure(row.get(name)) for row in rows] for name in ("phase", "step", *PLACES, *CURVES)},
        "loads": [_loads(phase) for phase in record.phases if phase.column("expert_load")],
        "experts": _shown(record.experts["checkpoints"]) if record.experts else [],
    }


def _thinned(rows: list[Row]) -> list[Row]:
    """Return evenly spaced rows if there are too many, and as many rows with a validation loss."""
    validated = [i for i, row in enumerate(rows) if "validation_loss" in row]
    kept = {indices[round(i)] for indices in (range(len(rows)), validated) for i in _evenly(len(indices), MOST_ROWS)}
    return [rows[i] for i in sorted(kept)]


def _evenly(n: int, most: int) -> list[float]:
    return np.linspace(0, n - 1, min(n, most)).tolist()


def _figure(value: Any) -> Any:
    """Round to six digits; average a list over layers."""
    if isinstance(value, list):
        value = sum(value) / len(value)
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _loads(phase: PhaseRecord) -> Row:
    """Return every expert's load over the fair share, by layer, expert and step; averaged over steps if too many."""
    loads = phase.column("expert_load")
    bins = np.array_split(np.arange(len(loads)), min(len(loads), MOST_COLUMNS))
    load_SLE = np.array([load for _, load in loads])
    relative_BLE = load_SLE.shape[2] * np.array([load_SLE[rows].mean(axis=0) for rows in bins])
    steps = [loads[rows[-1]][0]["step"] for rows in bins]
    return {
        "phase": phase.name,
        "steps": steps,
        "numbers": phase.model.expert_layers,
        "layers": np.round(relative_BLE.transpose(1, 2, 0), 2).tolist(),
    }


def _shown(checkpoints: list[Row]) -> list[Row]:
    """Return each phase's first, middle and last checkpoint."""
    shown = []
    for phase in sorted({one["phase"] for one in checkpoints}):
        own = [one for one in checkpoints if one["phase"] == phase]
        for i in sorted({0, len(own) // 2, len(own) - 1}):
            shown.append({"name": f"{phase_folder(own[i])} {own[i]['step']}", "layers": own[i]["layers"]})
    return shown


def _loss(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.6f}"


def _size(value: float | None) -> str:
    """Format for the page: 7.2 × 10⁻⁶."""
    if value is None:
        return "not finite"
    mantissa, power = f"{value:.1e}".split("e")
    raised = str(int(power)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{mantissa} × 10{raised}".replace("-", "−") if value else "0"


def _signed(value: float | None) -> str:
    return ("+" if value is not None and value > 0 else "") + _size(value)


def _count(n: int) -> str:
    return millions(n) if n >= 1e6 else f"{n:,}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
