"""Tables of `mlxmoe experts`: a row per checkpoint, and the tokens routed to the last one's experts."""

from __future__ import annotations

from typing import Any

import numpy as np

from mlx_moe.training.console import Console

SUMMARY_COLUMNS = ("phase, step", "busiest", "idlest", "dead", "entropy", "twins", "nearest", "twin neurons")
SUMMARY_LEGEND = (
    "Busiest, idlest: an expert's load over the fair share. Entropy: of the routers, nats, mean over layers. Twins: "
    "pairs of experts with equal weights. Nearest: relative distance of the nearest pair. Twin neurons: copies that "
    "growth made, with equal incoming weights"
)
TOKENS_IN_TABLE = 4


def show(report: dict[str, Any], console: Console) -> None:
    """Print a line for every checkpoint, over all layers; then the tokens of the last one's experts."""
    console.table(SUMMARY_COLUMNS, [summary(one) for one in report["checkpoints"]])
    console.line(f"{report['tokens']:,} tokens of the validation split. {SUMMARY_LEGEND}")
    last = report["checkpoints"][-1]
    console.title(f"Layer.expert, load, tokens by lift: phase {last['phase']}, step {last['step']}")
    for figures in last["layers"]:
        for expert, (load, tokens) in enumerate(zip(figures["load"], figures["tokens"], strict=True)):
            taken = "  ".join(f"{token['text']!r} {token['lift']:.1f}" for token in tokens[:TOKENS_IN_TABLE])
            console.line(f"{figures['layer']}.{expert:<3} {load * len(figures['load']):.2f}  {taken}")


def summary(one: dict[str, Any]) -> list[str]:
    """Return one checkpoint's cells, in the order of SUMMARY_COLUMNS."""
    load_LE, distance_LEE, clones = (
        np.array([layer["load"] for layer in one["layers"]]),
        np.array([layer["distance"] for layer in one["layers"]]),
        [layer["clones"] for layer in one["layers"] if layer.get("clones")],
    )
    n_experts = load_LE.shape[1]
    pairs = np.triu_indices(n_experts, k=1)
    copied = sum(layer["neurons"] for layer in clones)
    return [
        f"{phase_folder(one)} {one['step']}",
        f"{n_experts * load_LE.max():.2f}",
        f"{n_experts * load_LE.min():.2f}",
        str(sum(len(layer["dead"]) for layer in one["layers"])),
        f"{np.mean([layer['entropy'] for layer in one['layers']]):.3f}",
        f"{sum(len(layer['twins']) for layer in one['layers'])}/{len(load_LE) * len(pairs[0])}",
        f"{distance_LEE[:, *pairs].min(initial=np.inf):.3f}",
        f"{sum(layer.get('twin_neurons') or 0 for layer in clones)}/{copied}" if copied else "",
    ]


def phase_folder(one: dict[str, Any]) -> str:
    """Return the name of the phase's folder, such as `2-moe`, from the path of a checkpoint in its run."""
    _, _, below = one.get("checkpoint", "").partition("phases/")
    return below.partition("/")[0] or f"phase {one['phase']}"
