"""Analysis of a run's experts: load, co-activation, specialisation; dead experts and twins.

N tokens, V vocabulary, L layers, E experts, K experts per token, F neurons of an expert, D model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_moe.analysis.expert_table import show
from mlx_moe.analysis.run_reader import EXPERTS_FILE, read_run_config
from mlx_moe.config import GrowPhaseConfig, ModelConfig, RunConfig
from mlx_moe.data.tokenizers import Tokenizer
from mlx_moe.data.tokens import TokenData, fixed_windows, prepare
from mlx_moe.errors import InputError
from mlx_moe.parameters import Arrays, Weights
from mlx_moe.phases import get_phase, get_phases, phase_model
from mlx_moe.storage import checkpoint
from mlx_moe.storage.atomic import output_file, signature, writing
from mlx_moe.storage.checkpoint import Checkpoint
from mlx_moe.storage.run_folder import RunFolder, resume_command
from mlx_moe.terminal import echo
from mlx_moe.training.backend import Backend, Trainer
from mlx_moe.training.console import Console
from mlx_moe.transfer.growth import Split, layer_sources

Figures = NDArray[np.float64]
ExpertChoices = NDArray[np.int64]

TWIN_DISTANCE = 1e-3  # relative; identically updated experts end at 0 (GPUs: at rounding), all others far above
MIN_OCCURRENCES = 20  # minimum number of a token's occurrences to attribute it to an expert
TOKENS_SHOWN = 8


@dataclass(frozen=True)
class Routes:
    """Routing of N tokens by a model."""

    tokens_N: NDArray[np.int32]
    router_logits_LNE: NDArray[np.float32]
    experts_LNK: ExpertChoices


@dataclass(frozen=True)
class TakenToken:
    """A token's text and count, the share of these that choose an expert, and that over the expert's overall share."""

    text: str
    occurrences: int
    share: float
    lift: float


def report_experts(path: Path, out: Path, backend: Backend, device: str, n_sequences: int) -> None:
    """Write the result of `analyse` to a file, and print a table."""
    read_run_config(path)
    with writing(out, EXPERTS_FILE, "experts") as partial:
        report = {"generator": signature("experts")} | analyse(path, backend, device, n_sequences)
        partial.write_text(json.dumps(report) + "\n", encoding="utf-8")
    console = Console()
    show(report, console)
    console.line(f"wrote {output_file(out, EXPERTS_FILE)}")


def analyse(path: Path, backend: Backend, device: str, n_sequences: int) -> dict[str, Any]:
    """Analyse the experts in every checkpoint of a run, on validation tokens.

    Per checkpoint and `layer` with experts: `load` (E,), each expert's share of the assignments; router `entropy` in
    nats; `together` (E, E), the share of tokens that choose both (diagonal: the one); `distance` (E, E), see
    `weight_distances`; `dead` experts, which no token chooses; `twins`, pairs closer than TWIN_DISTANCE; `tokens`,
    those with the highest lift per expert; and after growth `clones`, see `clone_figures`.

    Raises InputError if the run has no such checkpoint, or its data is unavailable.
    """
    run = read_run_config(path)
    found = [
        folder
        for phase in get_phases(run)
        if phase.model.moe
        for folder in checkpoint.complete_in(path / "phases" / phase.folder)
    ]
    if not found:
        number = next((phase.number for phase in get_phases(run) if phase.model.moe), None)
        advice = f"; train phase {number}: {resume_command(path, '--phases', str(number))}" if number else ""
        raise InputError(f"{path} has no checkpoint with experts{advice}")
    data = prepare(run.data)
    RunFolder(path).check_data(data)
    texts = _texts(data.tokenizer)
    checkpoints = []
    for folder in found:
        try:
            loaded = checkpoint.load_listed(folder)
        except checkpoint.Pruned as error:
            echo(f"warning: {error}; it was left out", err=True)
            continue
        trainer = backend.trainer(loaded.config, loaded.weights, device=device)
        routes = routes_of(trainer, data, n_sequences, run.training.batch_size)
        checkpoints.append(
            {
                "checkpoint": str(folder.relative_to(path)),
                "phase": loaded.state.phase,
                "step": loaded.state.step,
                "layers": list(_layers(run, loaded, routes, texts)),
            }
        )
    if not checkpoints:
        raise InputError(f"{path}: its run deleted every checkpoint with experts before it was read; try again")
    return {"tokens": len(routes.tokens_N), "twin_distance": TWIN_DISTANCE, "checkpoints": checkpoints}


def routes_of(trainer: Trainer, data: TokenData, n_sequences: int, batch_size: int) -> Routes:
    """Route evenly spaced windows of the validation split."""
    tokens_BT = fixed_windows(data.validation, n_sequences, trainer.config.context_length)[:, :-1]
    starts = range(0, len(tokens_BT), batch_size)
    router_logits, experts = [], []
    for start in starts:
        routed = trainer.routed_logits(tokens_BT[start : start + batch_size])
        router_logits.append(routed.router_logits_LNE)
        experts.append(routed.experts_LNK)
    return Routes(tokens_BT.ravel(), np.concatenate(router_logits, axis=1), np.concatenate(experts, axis=1))


def chosen(experts_NK: ExpertChoices, n_experts: int) -> Figures:
    """Return (N, E): 1 where a token chooses an expert, else 0."""
    chosen_NE = np.zeros((len(experts_NK), n_experts))
    np.put_along_axis(chosen_NE, experts_NK, 1, axis=1)
    return chosen_NE


def router_entropy(router_logits_NE: NDArray[np.float32]) -> float:
    """Mean router entropy per token (nats); ln(E) when the router is uniform."""
    logits_NE = router_logits_NE.astype(np.float64)
    logits_NE -= logits_NE.max(axis=1, keepdims=True)
    log_probability_NE = logits_NE - np.log(np.exp(logits_NE).sum(axis=1, keepdims=True))
    return float(-(np.exp(log_probability_NE) * log_probability_NE).sum(axis=1).mean())


def weight_distances(experts_EP: list[NDArray[np.float32]]) -> Figures:
    """Return (E, E): ‖wᵢ − wⱼ‖ / √((‖wᵢ‖² + ‖wⱼ‖²) / 2) over two experts' weights; 0 if equal, √2 if unrelated.

    The first axis of each tensor runs over the experts.
    """
    n_experts = len(experts_EP[0])
    squares_E, apart_EE = np.zeros(n_experts), np.zeros((n_experts, n_experts))
    for array in experts_EP:
        squares_E += [_square(expert) for expert in array]
        for i, j in combinations(range(n_experts), 2):
            apart_EE[i, j] += _square(array[i] - array[j])
    mean_square_EE = (squares_E[:, None] + squares_E) / 2
    distances_EE = np.sqrt(apart_EE / mean_square_EE)
    return distances_EE + distances_EE.T


def twins(distances_EE: Figures) -> list[list[int]]:
    """Return the pairs of experts closer than TWIN_DISTANCE."""
    return np.argwhere(np.triu(distances_EE < TWIN_DISTANCE, k=1)).tolist()


def taken_tokens(tokens_N: NDArray[np.int32], chosen_NE: Figures, texts: list[str]) -> list[list[TakenToken]]:
    """Return, per expert, the TOKENS_SHOWN tokens of highest lift among those with MIN_OCCURRENCES.

    Lift is P(expert | token) / P(expert); ties go to the more frequent token.
    """
    occurrences_V = np.bincount(tokens_N, minlength=len(texts))
    share_E = chosen_NE.mean(axis=0)
    frequent = np.flatnonzero(occurrences_V >= MIN_OCCURRENCES)
    taken = []
    for expert, share in enumerate(share_E):
        taken_V = np.bincount(tokens_N, weights=chosen_NE[:, expert], minlength=len(texts))
        shares = taken_V[frequent] / occurrences_V[frequent]
        order = np.lexsort((-occurrences_V[frequent], -shares))[: TOKENS_SHOWN if share else 0]
        taken.append(
            [
                TakenToken(texts[frequent[i]], int(occurrences_V[frequent[i]]), shares[i], shares[i] / share)
                for i in order
                if shares[i] > share
            ]
        )
    return taken


def clone_figures(
    layer: int, before: ModelConfig, after: ModelConfig, split: Split, weights: Weights, routes: Routes
) -> dict[str, Any]:
    """Measure how far the copies made by growth have diverged in a layer.

    `neuron_distance` (E,), the median over copied neurons of the relative distance between the incoming weights of a
    copy and its original; at 0 both compute the same. `twin_neurons`: the number of copies closer than TWIN_DISTANCE,
    out of `neurons`. Uneven growth copies no neurons in new blocks. In a new block: `copy_of`, the layer it copies, and
    `same_experts`, the share of choices on which both agree.
    """
    sources = layer_sources(before.n_layers, after.n_layers)
    original = sources.index(sources[layer])
    has_copies = original == layer or split == "even"
    incoming_EFX = np.concatenate(
        [array.reshape(*array.shape[:2], -1) for name, array in _experts(weights, layer).items() if "down" not in name],
        axis=2,
    )
    width, wider = before.expert_d_ff, after.expert_d_ff
    copies = np.arange(width, wider if has_copies else width)
    originals_EFX, copies_EFX = incoming_EFX[:, copies % width], incoming_EFX[:, copies]
    norms_EF = np.linalg.norm(originals_EFX, axis=2) + np.linalg.norm(copies_EFX, axis=2)
    distances_EF = 2 * np.linalg.norm(copies_EFX - originals_EFX, axis=2) / np.maximum(norms_EF, 1e-30)
    figures: dict[str, Any] = {"neurons": copies.size * len(incoming_EFX)}
    if copies.size:
        figures |= {
            "neuron_distance": np.median(distances_EF, axis=1),
            "twin_neurons": int((distances_EF < TWIN_DISTANCE).sum()),
        }
    if original != layer:
        place, copied = (after.expert_layers.index(each) for each in (layer, original))
        pairs_NKK = routes.experts_LNK[place][:, :, None] == routes.experts_LNK[copied][:, None, :]
        figures |= {"copy_of": original, "same_experts": float(pairs_NKK.any(axis=2).mean())}
    return figures


def _layers(run: RunConfig, loaded: Checkpoint, routes: Routes, texts: list[str]) -> Iterator[dict[str, Any]]:
    phase = get_phase(run, loaded.state.phase)
    for place, layer in enumerate(loaded.config.expert_layers):
        experts_NK, router_logits_NE = routes.experts_LNK[place], routes.router_logits_LNE[place]
        chosen_NE = chosen(experts_NK, router_logits_NE.shape[1])
        load_E = chosen_NE.mean(axis=0) / experts_NK.shape[1]
        distances_EE = weight_distances(list(_experts(loaded.weights, layer).values()))
        figures = {
            "layer": layer,
            "load": load_E,
            "entropy": router_entropy(router_logits_NE),
            "together": chosen_NE.T @ chosen_NE / len(chosen_NE),
            "distance": distances_EE,
            "dead": np.flatnonzero(load_E == 0),
            "twins": twins(distances_EE),
            "tokens": [
                [asdict(token) for token in tokens] for tokens in taken_tokens(routes.tokens_N, chosen_NE, texts)
            ],
        }
        if isinstance(phase.config, GrowPhaseConfig):
            before = phase_model(run, phase.number - 1)
            figures["clones"] = clone_figures(layer, before, loaded.config, phase.config.split, loaded.weights, routes)
        yield _plain(figures)


def _experts(weights: Weights, layer: int) -> Arrays:
    """Return the tensors of a layer's experts; their first axis runs over the experts."""
    prefix = f"layers.{layer}.mlp.experts."
    return {name: weights[name] for name in weights if name.startswith(prefix)}


def _square(array: NDArray[np.float32]) -> float:
    """Return the squared norm."""
    return float(np.square(array, dtype=np.float64).sum())


def _texts(tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.decode([token]) for token in range(tokenizer.vocab_size)]


def _plain(value: Any) -> Any:
    """Convert for JSON: arrays to lists, numbers to five digits, which exceeds the sample's accuracy."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, np.ndarray | list):
        return [_plain(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(f"{value:.5g}")
    return int(value) if isinstance(value, np.integer) else value
