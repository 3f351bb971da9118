"""The experiment: a dense model, upcycled to experts, grown wider and deeper, each boundary proven lossless."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlx_moe.accounting import count_parameters
from mlx_moe.accounting.flops import flops_per_token
from mlx_moe.config import ModelConfig, OptimizerConfig, RunConfig
from mlx_moe.data.sources import BUILTIN
from mlx_moe.data.tokens import TokenData, check_length, fixed_windows, prepare
from mlx_moe.errors import InputError
from mlx_moe.parameters import Arrays, initialize
from mlx_moe.training import checkpoint
from mlx_moe.training.backend import Alone, Backend, Trainer, World, peak_flops_per_s
from mlx_moe.training.boundary import (
    centroid_routers,
    centroid_tokens,
    certify,
    phase_config,
    phase_model,
    plan_boundary,
)
from mlx_moe.training.checkpoint import TrainerState
from mlx_moe.training.console import Console
from mlx_moe.training.log import environment
from mlx_moe.training.loop import Phase, train_phase
from mlx_moe.training.results import report_phase, summarize
from mlx_moe.training.run_folder import RunFolder
from mlx_moe.training.stopping import Interruption, TrainingStopped, interruptions, stopping_at_once
from mlx_moe.training.trackers import check_installed
from mlx_moe.transfer.centroids import Routers
from mlx_moe.transfer.upcycling import LOSSY_METHOD, ZERO_ROUTER_WARNING


def train(run: RunConfig, directory: Path, backend: Backend, n_phases: int, options: Options, console: Console) -> None:
    """Run phases 1 to `n_phases` in a run's directory, or go on where its latest whole checkpoint stands.

    Raises InputError on what a user can mend, TrainingStopped on an interruption, a loss that is not finite, or a
    boundary that failed.
    """
    folder = RunFolder(directory, backend.connect())
    try:
        with stopping_at_once():
            experiment = begin(run, folder, backend, n_phases, options, console)
            folder.hold()
            rows = folder.metrics()
            phase, trainer, step = experiment.where_it_stands()
            experiment.introduce(trainer)
            folder.open_tracker(experiment.run, rows, console.warn)
        with interruptions() as interruption:
            while True:
                experiment.train(phase, trainer, step, interruption)
                if phase >= n_phases:
                    break
                trainer = experiment.cross_boundary(phase, trainer)
                phase, step = phase + 1, 0
        summarize(folder, console)
    finally:
        folder.close()


@dataclass(frozen=True)
class Options:
    """What belongs to this call and not to the run."""

    device: str = "auto"
    allow_lossy: bool = False


@dataclass(frozen=True)
class Experiment:
    run: RunConfig
    folder: RunFolder
    backend: Backend
    options: Options
    console: Console
    data: TokenData

    def where_it_stands(self) -> tuple[int, Trainer, int]:
        """(phase, trainer, steps done in it): the latest whole checkpoint, or a new dense model."""
        saved = self.folder.load_latest(self.console.warn)
        if saved is None:
            trainer = self._trainer(self.run.model, initialize(self.run.model, self.run.seed))
            return 1, trainer, 0
        trainer = self._trainer(saved.config, saved.weights)
        if saved.optimizer_state is not None:
            trainer.load_optimizer_state(saved.optimizer_state)
        self.folder.rewind(saved.state.phase, saved.state.step)
        path = checkpoint.folder(self.folder.path, saved.state.phase, saved.state.step)
        self.console.line(f"resuming from {path.relative_to(self.folder.path)}")
        return saved.state.phase, trainer, saved.state.step

    def introduce(self, trainer: Trainer) -> None:
        """Write down what the run is, and say it."""
        self.folder.introduce(self.run, self.data, environment(self.backend, trainer))
        tokens = {name: self.data.provenance[name]["tokens"] for name in ("train", "validation")}
        world = self.folder.world
        processes = f"; {world.size} processes, {self.run.engine.strategy}" if world.size > 1 else ""
        self.console.facts(
            [
                ("run", f"{self.run.name}, seed {self.run.seed}, in {self.folder.path}"),
                ("backend", f"{self.backend.reason}; device {trainer.device}{processes}"),
                ("hardware", _hardware(self.backend, trainer)),
                ("precision", trainer.precision.reason),
                ("optimizer", _optimizer(self.run.optimizer)),
                ("data", self.data.provenance["source"]["description"]),
                ("tokens", f"{tokens['train']:,} to train on, {tokens['validation']:,} held out"),
                ("tokenizer", f"{self.run.data.tokenizer}, {self.data.tokenizer.vocab_size:,} tokens"),
            ]
        )

    def train(self, number: int, trainer: Trainer, step: int, interruption: Interruption) -> None:
        phase = Phase(number, phase_config(self.run, number), from_scratch=self.run.model.moe is not None)
        if step < phase.config.steps:
            self.console.title(phase.title)
            model = trainer.config
            self.console.parameters(count_parameters(model), model.display_name, flops_per_token(model))
            self.console.line()
            train_phase(
                self.run, phase, trainer, self.data, self.folder, step, self.console, self.backend, interruption
            )
        reported = [row["phase"] for row in self.folder.history() if row["event"] == "phase"]
        if number not in reported:
            report_phase(self.run, phase, trainer, self.data, self.folder, self.console)
        if interruption.came(trainer.world):
            raise interruption.stopped(
                f"after phase {number}, which is saved; go on with: mlxmoe train --resume {self.folder.path}"
            )

    def cross_boundary(self, phase: int, trainer: Trainer) -> Trainer:
        """Upcycle after phase 1, grow after phase 2; go on only if nothing changed."""
        by_centroids = phase == 1 and self.run.phases.moe.router_init == "centroids"
        plan = plan_boundary(self.run, phase, trainer.config, self._centroids(trainer) if by_centroids else None)
        carry = self.run.optimizer.transfer == "carry"
        grown = trainer.transferred(plan, carry)
        limits = self.run.verification
        probes = fixed_windows(self.data.validation, limits.probe_sequences, trainer.config.context_length)
        certificate = certify(limits, trainer, grown, probes)
        verb = "upcycling" if phase == 1 else "growth"
        self.console.boundary(f"Boundary {phase}-{phase + 1}: {verb}", certificate)
        if phase == 1 and self.run.phases.moe.router_init == "zero":
            self.console.warn(ZERO_ROUTER_WARNING)
        if plan.is_lossy:
            self.console.warn(LOSSY_METHOD)
        allow_lossy = self.options.allow_lossy or plan.is_lossy
        record = certificate.to_json() | {"allowed_lossy": not certificate.passed and allow_lossy}
        file = self.folder.save_boundary(f"{phase}-{phase + 1}", record)
        if not certificate.passed and not allow_lossy:
            raise TrainingStopped(
                f"boundary {phase}-{phase + 1} changed the model (see {file}); phase {phase + 1} was not started; "
                "--allow-lossy goes on all the same",
                exit_code=1,
            )
        # Before the birth is saved: resuming without it drops this row and crosses again; after it, both are there.
        self.folder.log_event({"event": "boundary", "phase": phase + 1, **record})
        state = TrainerState(phase + 1, 0, self.backend.name)
        optimizer_state = grown.optimizer_state() if carry else None
        self.folder.save(grown.config, state, grown.weights(), optimizer_state, self.run.training.keep_checkpoints)
        return grown

    def _centroids(self, trainer: Trainer) -> Routers:
        """Of evenly spaced windows of the training data; from the first process, so that all have the same."""
        config, phase, world, weights = trainer.config, self.run.phases.moe, trainer.world, trainer.weights()
        found = b""
        if world.rank == 0:
            n = -(-centroid_tokens(phase) // config.context_length)
            tokens_BT = fixed_windows(self.data.train, n, config.context_length)[:, :-1]
            dense = self.backend.streamed(config, weights, self.options.device)
            routers = centroid_routers(dense, phase, tokens_BT, self.run.seed)
            found = np.array(list(routers.values())).tobytes()
        rows_LED = np.frombuffer(world.from_first(found), np.float32).reshape(-1, phase.n_experts, config.d_model)
        return dict(zip(phase_model(self.run, 2).expert_layers, rows_LED, strict=True))

    def _trainer(self, model: ModelConfig, weights: Arrays) -> Trainer:
        return self.backend.trainer(model, self.run.optimizer, weights, self.options.device, self.run.engine)


def _hardware(backend: Backend, trainer: Trainer) -> str:
    place = "cpu" if trainer.device == "CPU" else "gpu"
    speed, peak = backend.speed, peak_flops_per_s(backend, trainer.precision.name, trainer.device)
    cores = f", {os.cpu_count()} cores" if place == "cpu" else ""
    memory = f"{speed.usable_bytes(place) / 1e9:.1f} GB usable"
    return f"{speed.device_name(place)}{cores}, {memory}, {peak / 1e12:.3g} TFLOP/s at best in {trainer.precision.name}"


def _optimizer(optimizer: OptimizerConfig) -> str:
    beta_1, beta_2 = optimizer.betas
    adamw = f"AdamW (betas {beta_1:g} and {beta_2:g}, eps {optimizer.eps:g})"
    rule = adamw if optimizer.name == "adamw" else f"Muon (momentum {optimizer.momentum:g}) and {adamw}"
    return f"{rule}, weight decay {optimizer.weight_decay:g}, gradients clipped at {optimizer.max_grad_norm:g}"


def open_run(directory: Path, world: World = Alone()) -> RunConfig:
    """The config of a run to resume. Raises InputError where there is none."""
    return RunFolder(directory, world).open()


def begin(
    run: RunConfig, folder: RunFolder, backend: Backend, n_phases: int, options: Options, console: Console
) -> Experiment:
    """Prepare the data and fit the vocabulary to it. Writes nothing, so that bad input leaves nothing behind."""
    check_installed(run.training.tracker)
    for phase in range(2, n_phases + 1):
        phase_model(run, phase)  # refuses growth that is not exact, before hours of training
    _check_batch(run, folder.world)
    data = prepare(run.data, progress=console.line)
    folder.check_data(data)
    run = fit_vocabulary(_with_absolute_paths(run), data.tokenizer.vocab_size)
    for tokens in (data.train, data.validation):
        check_length(tokens, run.model.context_length)
    return Experiment(run, folder, backend, options, console, data)


def _check_batch(run: RunConfig, world: World) -> None:
    batch_size, shares = run.training.batch_size, world.size * run.engine.accumulation_steps
    if batch_size % shares:
        raise InputError(
            f"training.batch_size {batch_size} does not come in {shares} equal parts: {world.size} processes times "
            f"engine.accumulation_steps {run.engine.accumulation_steps}; take {-(-batch_size // shares) * shares}"
        )


def _with_absolute_paths(run: RunConfig) -> RunConfig:
    """So that a run can be resumed from another folder."""
    named = {"source": run.data.source, "tokenizer": run.data.tokenizer}
    paths = {key: Path(name).expanduser() for key, name in named.items() if name not in (*BUILTIN, "char")}
    found = {key: str(path.resolve()) for key, path in paths.items() if path.exists()}
    return run.model_copy(update={"data": run.data.model_copy(update=found)})


def fit_vocabulary(run: RunConfig, vocab_size: int) -> RunConfig:
    """The model takes the tokenizer's size, unless its own was given; that one must hold all tokens."""
    if run.data.fit_vocabulary:
        return run.model_copy(update={"model": run.model.model_copy(update={"vocab_size": vocab_size})})
    if run.model.vocab_size < vocab_size:
        raise InputError(
            f"model.vocab_size {run.model.vocab_size} is smaller than the tokenizer's {vocab_size}; "
            f"leave model.vocab_size out, or take at least {vocab_size}"
        )
    return run
