"""Resource estimates of a run before it starts: memory, time and batch sizes, on this and other machines."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_moe.accounting import count_parameters, machines
from mlx_moe.accounting.estimate import (
    EFFICIENCY,
    LARGEST_BATCH,
    PRODUCTS_OF_PEAK,
    Estimate,
    Target,
    Workload,
    fit,
    site_of,
)
from mlx_moe.config import RunConfig
from mlx_moe.data.tokenizers import Tokenizer, bpe_vocabulary
from mlx_moe.errors import InputError, quoted
from mlx_moe.phases import get_phases, trained_model
from mlx_moe.precision import choose_precision
from mlx_moe.storage.atomic import absolute
from mlx_moe.terminal import echo
from mlx_moe.training.backend import Backend, choose_backend
from mlx_moe.training.console import Console, millions

THIS = "this machine"
GPT2_VOCABULARY = 50257
EXAMPLES = ("M1 16GB", "M2 Max 32GB", "M4 Max 64GB", "RTX 4090 24GB", "H100 80GB")


@dataclass(frozen=True)
class RunPlan:
    run: RunConfig
    works: list[Workload]
    sites: list[Target]  # the first is the target: this machine, or a named one
    fits: list[list[Estimate]]  # for every machine and phase

    def to_json(self) -> dict[str, Any]:
        phases = {
            work.name: {
                "architecture": work.model.display_name,
                "parameters": work.parameters.to_json(),
                "flops_per_token": work.flops.to_json(),
                "tokens": work.tokens,
                "batch_size": work.batch_size,
            }
            for work in self.works
        }
        sites = [
            {
                "machine": site.label,
                "backend": site.backend,
                "precision": site.precision,
                "usable_bytes": site.usable_bytes,
                "matmul_flops_per_s": round(site.flops_per_s),
                "assumed_efficiency": EFFICIENCY,
                "phases": {work.name: fit.to_json() for work, fit in zip(self.works, fits, strict=True)},
            }
            for site, fits in zip(self.sites, self.fits, strict=True)
        ]
        return {"run": self.run.name, "phases": phases, "machines": sites, "warnings": warnings(self)}


def make_plan(run: RunConfig, backend: str = "auto", machine: str | None = None) -> RunPlan:
    """Return the plan of a run on this machine with a backend, or on a named one; others are added for comparison.

    Raises InputError for an unknown machine, and for a backend that is not installed.
    """
    run = with_its_vocabulary(run)
    if machine is None:
        first = this_machine(run, choose_backend(backend))
    elif backend != "auto":
        raise InputError(
            f"--backend {quoted(backend)} is for this machine; leave it out, or leave out --machine {quoted(machine)}"
        )
    else:
        first = site_of(*machines.choose_machine(machine), run.engine)
    works = [
        Workload(
            name=phase.folder,
            model=trained_model(run, phase.number),
            optimizer=run.optimizer,
            engine=run.engine,
            batch_size=run.training.batch_size,
            steps=phase.config.steps,
        )
        for phase in get_phases(run)
    ]
    examples = [site_of(*machines.choose_machine(example), run.engine) for example in EXAMPLES]
    sites = [first, *(site for site in examples if site.label != first.label)]
    return RunPlan(run, works, sites, [[fit(work, site) for work in works] for site in sites])


def this_machine(run: RunConfig, backend: Backend) -> Target:
    """Return this machine, with its rate of matrix products measured in half a second."""
    device = backend.device.choose_device("auto")
    name = backend.device.device_name(device)
    precision = choose_precision(run.engine.precision, device, has_bf16=True).name
    known = machines.lookup(name)
    return Target(
        label=f"{THIS}: {name}",
        backend=backend.name,
        device=device.kind,
        precision=precision,
        usable_bytes=backend.device.usable_bytes(device),
        flops_per_s=backend.device.measure_flops_per_s(precision, device),
        bytes_per_s=known.bandwidth * 1e9 if known and device.kind == "gpu" else None,
    )


def with_its_vocabulary(run: RunConfig) -> RunConfig:
    """Return the run with its tokenizer's vocabulary size, if that is known before the text is read."""
    size = vocabulary_size(run)
    return run.model_copy(update={"model": run.model.model_copy(update={"vocab_size": size or run.model.vocab_size})})


def vocabulary_size(run: RunConfig) -> int | None:
    """Return the vocabulary size, if the config determines it (`bpe:2048`, a folder, GPT-2); else None.

    Raises InputError if the folder's tokenizer cannot be read.
    """
    if not run.data.fit_vocabulary:
        return run.model.vocab_size
    name = run.data.tokenizer
    if name == "bpe" or name.startswith("bpe:"):
        return bpe_vocabulary(name)
    if name in ("char", "gpt2"):
        return {"gpt2": GPT2_VOCABULARY}.get(name)
    folder = absolute(Path(name))
    return Tokenizer.load(folder).vocab_size if folder.is_dir() else None


def vocabulary_warnings(run: RunConfig) -> list[str]:
    """Return a warning if the vocabulary size is unknown, and the counts rest on an assumption."""
    if vocabulary_size(run) is not None:
        return []
    return [
        f"the vocabulary of tokenizer {run.data.tokenizer} is not known before the data is read; "
        f"{run.model.vocab_size:,} tokens assumed (set it with -o model.vocab_size=N)"
    ]


def show_parameters(run: RunConfig, as_json: bool) -> None:
    """Print the parameters of every phase."""
    run = with_its_vocabulary(run)
    models = {phase.folder: phase.model for phase in get_phases(run)}
    counts = {name: count_parameters(model) for name, model in models.items()}
    warned = vocabulary_warnings(run)
    if as_json:
        for warning in warned:
            echo(f"warning: {warning}", err=True)
        rows = {name: {"architecture": models[name].display_name, **counts[name].to_json()} for name in models}
        echo(json.dumps(rows, indent=2))
        return
    console = Console()
    console.table(
        ["phase", "total", "active per token", "inactive", "idle experts", "active %"],
        [
            [name, *map(millions, (n.total, n.active, n.inactive)), str(n.idle_experts), f"{100 * n.efficiency:.1f}"]
            for name, n in counts.items()
        ],
    )
    console.summary([(name, model.display_name) for name, model in models.items()])
    for warning in warned:
        console.warn(warning)


def show(plan: RunPlan, as_json: bool) -> None:
    """Print a plan; warnings come last."""
    if as_json:
        echo(json.dumps(plan.to_json(), indent=2))
        return
    console, run, site = Console(), plan.run, plan.sites[0]
    console.summary(
        [
            ("run", f"{run.name}, batches of {run.training.batch_size} × {run.model.context_length} tokens"),
            ("on", f"{site.label}, {site.backend}, {site.precision}, {_gb(site.usable_bytes)} GB usable"),
        ]
    )
    console.title("A step's memory, GB")
    console.table(
        ["phase", "parameters", "weights", "gradients", "moments", "activations", "peak", "fits"],
        [
            [
                work.name,
                millions(work.parameters.total),
                *(_gb(n) for n in (memory.weights, memory.gradients, memory.optimizer, memory.kept, memory.peak)),
                "yes" if here.fits else "no",
            ]
            for work, here in zip(plan.works, plan.fits[0], strict=True)
            for memory in [here.memory]
        ],
    )
    console.title("Time")
    console.table(
        ["phase", "tokens", "MFLOP per token", "TFLOP a step", "time", "largest batch"],
        [
            [
                work.name,
                f"{work.tokens / 1e6:.2f} M",
                f"{work.flops.training / 1e6:,.0f}",
                f"{work.flops.training * work.tokens / work.steps / 1e12:,.2f}",
                _duration(here.seconds),
                _batch(here.largest_batch),
            ]
            for work, here in zip(plan.works, plan.fits[0], strict=True)
        ],
    )
    console.title("Other machines: time and largest batch")
    console.table(
        ["machine", "usable GB", *(work.name for work in plan.works)],
        [
            [
                site.label,
                _gb(site.usable_bytes),
                *(
                    f"{_duration(there.seconds)}, {_batch(there.largest_batch)}" if there.fits else "too small"
                    for there in fits
                ),
            ]
            for site, fits in zip(plan.sites[1:], plan.fits[1:], strict=True)
        ],
    )
    measured = "measured" if site.label.startswith(THIS) else f"{100 * PRODUCTS_OF_PEAK:.0f} % of its peak"
    console.line(
        f"Times assume {100 * EFFICIENCY:.0f} % of the rate of large matrix products, "
        f"here {site.flops_per_s / 1e12:.3g} TFLOP/s ({measured})."
    )
    for warning in warnings(plan):
        console.warn(warning)


def warnings(plan: RunPlan) -> list[str]:
    """Return warnings: assumptions, and every phase that does not fit the target machine."""
    site = plan.sites[0]
    lines = vocabulary_warnings(plan.run)
    for work, here in zip(plan.works, plan.fits[0], strict=True):
        if not here.fits:
            ways = "; or ".join(here.remedies) or ("only a smaller model or a larger machine")
            peak, usable = _gb(here.memory.peak), _gb(site.usable_bytes)
            moment = {"loss": "at the loss", "backward": "in the backward pass", "update": "in the update"}
            when = moment[here.memory.peak_moment]
            lines.append(f"{work.name} needs {peak} GB {when} and {usable} are usable. To make it fit: {ways}")
    return lines


def _gb(n: int) -> str:
    return f"{n / 1e9:.2f}" if n < 1e10 else f"{n / 1e9:.1f}"


def _batch(n: int) -> str:
    return f"{n}+" if n >= LARGEST_BATCH else str(n) if n else "none"


def _duration(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"
