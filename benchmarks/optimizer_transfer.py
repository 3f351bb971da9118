"""Effect of Adam's moments across a boundary: the demo run from the same checkpoints, with moments carried and reset.

    python benchmarks/optimizer_transfer.py TEXT.jsonl

Writes docs/images/optimizer-transfer.json, .svg and .png. E experts, K experts per token.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import typer

from mlx_moe.config import RunConfig
from mlx_moe.data.tokens import TokenData, batch, fixed_windows, prepare
from mlx_moe.parameters import Arrays, initialize
from mlx_moe.phases import get_phase, phase_config
from mlx_moe.presets import load_run
from mlx_moe.training.backend import Backend, Trainer, choose_backend
from mlx_moe.training.loop import evaluate
from mlx_moe.training.run import fit_vocabulary
from mlx_moe.training.schedule import learning_rate
from mlx_moe.transfer.plan import Plan, carry_moments

DOCS = Path(__file__).parents[1] / "docs" / "images"
STEPS = {1: 400, 2: 100, 3: 100}
EVERY = 10  # steps between validations
WARMUP = 20
CARRY, WITHOUT_NOISE, RESET = "carried", "carried, v / E²", "reset"
LINES = {RESET: ("#b3422e", "-"), WITHOUT_NOISE: ("#7a7a7a", "--"), CARRY: ("#1b5fa8", "-")}


def main(data: Path, seeds: int = 2, backend: str = "torch") -> None:
    file = DOCS / "optimizer-transfer.json"
    run = load_run(
        "demo",
        overrides=[
            *(f"data.source={data}", "data.tokenizer=bpe:1024", "model.context_length=64"),
            *("model.d_model=96", "model.n_layers=3", "phases.large_moe.d_model=144", "phases.large_moe.n_layers=4"),
            *(f"phases.{name}.steps={STEPS[i]}" for i, name in enumerate(("dense", "moe", "large_moe"), start=1)),
        ],
    )
    tokens = prepare(run.data, progress=print)
    run = fit_vocabulary(run, tokens.tokenizer.vocab_size)
    results: dict[str, Any] = {"steps": STEPS, "curves": [], "second_moments": []}
    for seed in range(seeds):
        measure(run.model_copy(update={"seed": seed}), tokens, choose_backend(backend), results)
        file.write_text(json.dumps(results) + "\n", encoding="utf-8")
    plot(results)


def measure(run: RunConfig, data: TokenData, backend: Backend, results: dict[str, Any]) -> None:
    """Measure one seed: phase 1 once, then phases 2 and 3 in every variant from the same checkpoint and batches."""
    trainer = backend.trainer(run.model, initialize(run.model, run.seed), run.optimizer)
    train(run, data, trainer, 1, run.phases["dense"].warmup_steps)
    for phase in (2, 3):
        after = get_phase(run, phase)
        plan = after.transfer.plan(trainer.config, after.config, run.seed, None)
        unclipped = run.optimizer.model_copy(update={"max_grad_norm": 1e9})
        resting = [
            backend.trainer(model.config, model.weights(), unclipped)
            for model in (trainer, trainer.apply_transfer(plan))
        ]
        results["second_moments"].append(
            {"seed": run.seed, "phase": phase, **second_moments(run, data, plan, *resting)}
        )
        ends = {}
        for warmup in (WARMUP, 0):
            for variant in (CARRY, RESET) if warmup or phase == 3 else (CARRY, WITHOUT_NOISE, RESET):
                after = trainer.apply_transfer(plan, carry=variant != RESET)
                if variant == WITHOUT_NOISE:
                    after.load_optimizer_state(without_noise(after.optimizer_state(), run))
                curves = train(run, data, after, phase, warmup)
                results["curves"].append(
                    {"seed": run.seed, "phase": phase, "variant": variant, "warmup": warmup, **curves}
                )
                ends[variant, warmup] = after
                print(run.seed, phase, warmup, f"{variant:16}", *(f"{x:.4f}" for x in curves["validation"]), flush=True)
        trainer = ends[CARRY, WARMUP]


def train(run: RunConfig, data: TokenData, trainer: Trainer, phase: int, warmup: int) -> dict[str, list[float]]:
    """Return the training losses of every step, and validation losses of every EVERY-th, from step 0."""
    config = phase_config(run, phase).model_copy(update={"warmup_steps": warmup})
    windows = fixed_windows(data.validation, 48, run.model.context_length)
    training, validation = [], [evaluate(trainer, windows, 16)]
    for step in range(config.steps):
        rate = learning_rate(config, step)
        training.append(trainer.step(draw(run, data, phase, step), rate, 0)().cross_entropy)
        if phase > 1 and (step + 1) % EVERY == 0:
            validation.append(evaluate(trainer, windows, 16))
    return {"training": np.round(training, 5).tolist(), "validation": np.round(validation, 5).tolist()}


def draw(run: RunConfig, data: TokenData, phase: int, step: int) -> Any:
    size, length = run.training.batch_size, run.model.context_length
    return batch(data.train, seed=run.seed, phase=phase, step=step, batch_size=size, context_length=length)


def second_moments(run: RunConfig, data: TokenData, plan: Plan, before: Trainer, after: Trainer) -> dict[str, float]:
    """Return v measured over 40 batches at a learning rate of 0, relative to v carried: of experts, and of the rest.

    Geometric means over tensors; each ratio is of means over entries that are neither pads nor new.
    """
    for step in range(40):
        for trainer in (before, after):
            trainer.step(draw(run, data, 9, step), 0.0, 0)
    measured = after.optimizer_state()
    carried = carry_moments(plan, before.optimizer_state(), measured.keys())
    ratios: dict[str, list[float]] = {"experts": [], "others": []}
    for tensor in plan.tensors:
        v, v_carried = measured[f"v.{tensor.target}"], carried[f"v.{tensor.target}"]
        if v_carried.any():
            kind = "experts" if ".experts." in tensor.target else "others"
            ratios[kind].append(float(v[v_carried > 0].mean() / v_carried[v_carried > 0].mean()))
    return {kind: float(np.exp(np.mean(np.log(values)))) for kind, values in ratios.items()}


def without_noise(state: Arrays, run: RunConfig) -> Arrays:
    """Replace v / (K·E) by v / E² in the experts."""
    factor = np.float32(run.phases["moe"].top_k / run.phases["moe"].n_experts)
    return {
        name: array * factor if name.startswith("v.") and ".experts." in name else array
        for name, array in state.items()
    }


def plot(results: dict[str, Any]) -> None:
    """Plot validation loss relative to the boundary: seeds as thin lines, their mean as a thick one."""
    plt.rcParams.update(
        {"font.size": 10, "svg.hashsalt": "mlxmoe", "axes.spines.top": False, "axes.spines.right": False}
    )
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.4), sharex=True, sharey="row", layout="constrained")
    titles = {2: "upcycling to 8 experts", 3: "growth, half as wide again and a block deeper"}
    for phase, row in zip((2, 3), axes, strict=True):
        for warmup, axis in zip((0, WARMUP), row, strict=True):
            axis.axhline(0, color="#999999", linewidth=0.8)
            for variant, (color, style) in LINES.items():
                curves = curves_of(results, phase, variant, warmup)
                if not len(curves):
                    continue
                steps = np.arange(curves.shape[1]) * EVERY
                axis.plot(steps, curves.T, style, color=color, linewidth=0.7, alpha=0.35)
                axis.plot(steps, curves.mean(axis=0), style, color=color, linewidth=2, label=variant)
            axis.set_title(
                f"{titles[phase]}\n" + (f"{warmup} steps of warm-up" if warmup else "no warm-up"), fontsize=10
            )
            axis.grid(axis="y", color="#e6e6e6", linewidth=0.8)
            axis.set_axisbelow(True)
            axis.tick_params(length=0)
        row[0].set_ylabel("validation loss − at the boundary\n(nats per token)")
    for axis in axes[1]:
        axis.set_xlabel("steps after the boundary")
    axes[0, 0].legend(title="moments", frameon=False, loc="lower left")
    for ending in ("svg", "png"):
        metadata = {"Date": None} if ending == "svg" else None
        figure.savefig(DOCS / f"optimizer-transfer.{ending}", dpi=150, metadata=metadata)


def curves_of(results: dict[str, Any], phase: int, variant: str, warmup: int) -> Any:
    """Return (seeds, validations): losses relative to the first."""
    wanted = {"phase": phase, "variant": variant, "warmup": warmup}
    found = [row["validation"] for row in results["curves"] if wanted.items() <= row.items()]
    return np.array(found) - np.array(found)[:, :1] if found else np.empty((0, 0))


if __name__ == "__main__":
    typer.run(main)
