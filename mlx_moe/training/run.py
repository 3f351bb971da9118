"""Training of a run: its phases in order, with a certified boundary between them, resumable at any point."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_moe.accounting import count_parameters
from mlx_moe.accounting.flops import flops_per_token
from mlx_moe.config import ModelConfig, RunConfig, UpcyclePhaseConfig
from mlx_moe.data.sources import BUILTIN
from mlx_moe.data.tokens import TokenData, check_length, fixed_windows, prepare
from mlx_moe.errors import InputError, is_out_of_memory, one_line
from mlx_moe.parameters import Weights, initialize, merge_lora, parameter_table, start_adapters
from mlx_moe.phases import Phase, get_phase, get_phases, phase_config, phase_state, start_phase, trained_model
from mlx_moe.processes import ProcessGroup, SingleProcess
from mlx_moe.storage import checkpoint
from mlx_moe.storage.identity import RunIdentity, changed_settings, differences
from mlx_moe.storage.run_folder import CONFIG, HISTORY, METRICS, RunFolder, resume_command
from mlx_moe.training.backend import Backend, Trainer
from mlx_moe.training.centroids import centroid_routers, centroid_tokens
from mlx_moe.training.certify import PROBE_TOKENS, certify
from mlx_moe.training.console import Console, millions
from mlx_moe.training.environment import environment, library_versions
from mlx_moe.training.from_checkpoint import check_model, weights_sha256
from mlx_moe.training.loop import Session, train_phase
from mlx_moe.training.memory import check_address_space, needed_bytes
from mlx_moe.training.phase_summary import describe_model, phase_result, report_phase, summarize
from mlx_moe.training.request import Options, RunRequest, resolve
from mlx_moe.training.run_header import summary_rows
from mlx_moe.training.stopping import Interruption, TrainingStopped, interruptions, stopping_at_once
from mlx_moe.training.trackers import Tracker, check_installed, open_tracker
from mlx_moe.transfer.centroids import Routers
from mlx_moe.transfer.upcycling import LOSSY_METHOD, ZERO_ROUTER_WARNING
from mlx_moe.validation import by_path


def train_run(request: RunRequest, console: Console | None = None) -> Path:
    """Begin or resume a requested run, and return its folder. Raises as `train_phases`."""
    found = resolve(request)
    console = console or Console(quiet=found.backend.connect().rank > 0)
    train_phases(found.run, found.folder, found.backend, found.last_phase, found.options, console)
    return found.folder


def train_phases(
    run: RunConfig, directory: Path, backend: Backend, last_phase: int, options: Options, console: Console
) -> None:
    """Train the phases up to number `last_phase`, from the latest undamaged checkpoint if there is one.

    Raises InputError on what a user can fix, TrainingStopped on an interruption, a non-finite loss, exhausted memory,
    or a failed boundary.
    """
    folder, doing = RunFolder(directory, backend.connect(), warn=console.warn), "before training began"
    try:
        with stopping_at_once():
            experiment = prepare_experiment(run, folder, backend, last_phase, options, console)
            if options.threads is not None:
                backend.device.set_threads(options.threads)
            phases = range(run.first_phase, last_phase + 1)
            check_address_space(experiment.run, phases, backend, options.device)
            folder.acquire_lock()
            if options.is_new:
                folder.check_not_begun()
            rows = folder.metrics()
            phase, trainer, step = experiment.resume_or_init()
            is_done = phase == last_phase and phase >= 1 and step >= phase_config(run, phase).steps
            experiment.warn_of_lost_rows(rows, phase, step)
            experiment.write_metadata(trainer, last_phase, is_done)
            if options.saves_start and step == 0:
                experiment.save_start(trainer)
            experiment.warn_of_memory(trainer, range(max(phase, run.first_phase), last_phase + 1))
            folder.tracker = experiment.open_tracker(rows)
        with interruptions() as interruption:
            while True:
                doing = f"in phase {phase}"
                if phase >= run.first_phase:
                    experiment.train(phase, trainer, step, interruption)
                if phase >= last_phase:
                    break
                doing = f"at boundary {phase}-{phase + 1}"
                trainer = experiment.cross_boundary(phase, trainer)
                phase, step = phase + 1, 0
        summarize(experiment.run, folder, console)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingStopped(
            f"out of memory {doing} ({one_line(error)}); {folder.last_saved()}; a smaller training.batch_size, "
            "engine.accumulation_steps and engine.activation_checkpointing help; mlxmoe plan says what a run needs",
            exit_code=1,
        ) from None
    finally:
        folder.close()


@dataclass(frozen=True)
class Experiment:
    run: RunConfig
    folder: RunFolder
    backend: Backend
    options: Options
    console: Console
    data: TokenData

    def resume_or_init(self) -> tuple[int, Trainer, int]:
        """Return (phase, trainer, steps done) from the latest undamaged checkpoint, or from the run's initial model."""
        saved = self.folder.load_latest(self.console.warn)
        if saved is None:
            if self.folder.lock is not None:  # else the folder does not exist, or is another process's
                self.folder.truncate_after(0, 0)  # rows that an earlier attempt wrote before its first checkpoint
            phase = start_phase(self.run)
            trainer = self._trainer(self.run.model, self._first_weights())
            return phase, self._adapted(trainer, phase) if phase >= self.run.first_phase else trainer, 0
        self._check_config(saved.config, saved.state.phase)
        trainer = self._trainer(saved.config, saved.weights)
        if saved.optimizer_state is not None:
            trainer.load_optimizer_state(saved.optimizer_state)
        self.folder.truncate_after(saved.state.phase, saved.state.step)
        path = checkpoint.folder(self.folder.path, saved.state.phase_folder, saved.state.step)
        self.console.line(f"resuming from {path.relative_to(self.folder.path)}")
        return saved.state.phase, trainer, saved.state.step

    def _check_config(self, saved: ModelConfig, phase: int) -> None:
        """Raise InputError if the run's config describes another model than its checkpoints."""
        if phase > len(self.run.phases):
            raise InputError(
                f"cannot resume {self.folder.path}: {CONFIG} has {len(self.run.phases)} phases, and there is a "
                f"checkpoint of phase {phase}; restore {CONFIG}, or begin another run"
            )
        asked = by_path(trained_model(self.run, phase).model_dump())
        for key, value in by_path(saved.model_dump()).items():
            if asked.get(key) != value:
                raise InputError(
                    f"cannot resume {self.folder.path}: {CONFIG} says {key} {asked.get(key)} for phase {phase}, its "
                    f"checkpoint {value}; restore {CONFIG}, or begin another run"
                )

    def write_metadata(self, trainer: Trainer, last_phase: int, is_done: bool) -> None:
        """Write the run's metadata and print them; if it was begun differently, print the consequences.

        If all steps are done (`is_done`), only the last phase may differ.
        """
        before = self.folder.identity()
        now = self._identity(trainer, last_phase, before)
        changed = [] if before is None else changed_settings(before, now)
        if before is not None and is_done:
            now = before.model_copy(update={"last_phase": last_phase})
        elif before is not None:
            differing = list(dict.fromkeys([*before.differences, *differences(before, now)]))
            now = now.model_copy(update={"differences": differing})
        seen = environment(self.backend, trainer)
        self.folder.write_metadata(self.run, now, self.data, seen, self.options.is_new)
        self.console.summary(summary_rows(self.run, self.folder.path, self.data, self.backend, trainer))
        if changed:
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            self.console.warn(f"{CONFIG} is not as it was when the run began: {'; '.join(changed[:3])}{more}")
        if now.differences:
            self.console.line(f"not bit for bit: {'; '.join(now.differences)}")

    def _identity(self, trainer: Trainer, last_phase: int, before: RunIdentity | None) -> RunIdentity:
        on_cpu = trainer.device.kind == "cpu"
        libraries = {self.backend.name, "numpy"}
        start = None if before is None else before.start_sha256
        if self.options.is_new and self.run.start is not None and not self.options.saves_start:
            start = weights_sha256(Path(self.run.start.model))
        return RunIdentity(
            backend=self.backend.name,
            device=trainer.device.kind,
            device_label=trainer.device.label,
            precision=trainer.precision.name,
            threads=self.backend.device.threads() if on_cpu else None,
            instructions=self.backend.device.instructions() if on_cpu else None,
            processes=trainer.world.size,
            machine=platform.machine(),
            versions={name: version for name, version in library_versions().items() if name in libraries and version},
            last_phase=last_phase,
            allow_lossy=self.options.allow_lossy,
            config=self.run.model_dump(mode="json", exclude={"data"}),
            start_sha256=start,
        )

    def warn_of_lost_rows(self, metrics: list[dict[str, Any]], phase: int, step: int) -> None:
        """Warn of rows up to the current step that are missing from the logs."""
        before = self.folder.identity()
        every: list[Any] = [self.run.training.log_every]
        if before is not None:  # the interval may have been changed since
            every.append(by_path(before.config).get("training.log_every"))
        interval = max(steps for steps in every if isinstance(steps, int))
        logged = [row["step"] for row in metrics if row["phase"] == phase and row["step"] <= step]
        if step and (min(logged, default=step) > 0 or max(logged) <= step - interval):
            self.console.warn(f"{METRICS} lacks rows of phase {phase} up to step {step}; their contents are lost")
        history = [(row["event"], row["phase"]) for row in self.folder.history()]
        for number in range(start_phase(self.run), phase):
            for event in (("phase", number), ("boundary", number + 1)):
                if event not in history and event[1] >= self.run.first_phase:
                    self.console.warn(f"{HISTORY} lacks the row of {event[0]} {event[1]}; its contents are lost")

    def warn_of_memory(self, trainer: Trainer, phases: Iterable[int]) -> None:
        """Warn of phases that will hardly fit; with several processes there is no estimate."""
        usable = self.backend.device.usable_bytes(trainer.device)
        for phase in phases if trainer.world.size == 1 else ():
            needed = needed_bytes(self.run, phase, self.backend, self.options.device)
            if needed > usable:
                self.console.warn(
                    f"phase {phase} will need about {needed / 1e9:.1f} GB, and {usable / 1e9:.1f} GB are usable; "
                    f"see: mlxmoe plan --config {self.folder.path / CONFIG}"
                )

    def open_tracker(self, rows: list[dict[str, Any]]) -> Tracker | None:
        """Open the run's tracker, on rank 0 only; it has these rows already."""
        if self.folder.world.rank:
            return None
        return open_tracker(self.run, self.folder.path, rows, self.console.warn)

    def train(self, number: int, trainer: Trainer, step: int, interruption: Interruption) -> None:
        phase = get_phase(self.run, number)
        if step < phase.config.steps:
            self.folder.drop_result(number)
            self.console.title(phase.title)
            model = trainer.config
            self.console.parameters(count_parameters(model), model.display_name, flops_per_token(model))
            if model.lora:
                trained = sum(
                    math.prod(parameter.shape) for parameter in parameter_table(model) if parameter.is_trained
                )
                self.console.summary(
                    [("trained", f"{millions(trained)} in adapters of rank {model.lora.rank} and routers")]
                )
            self.console.line()
            session = Session(self.run, self.data, self.backend, self.folder, self.console, interruption)
            train_phase(session, phase, trainer, step)
        elif step:
            self.console.line(f"phase {number}: nothing left to train after step {step}")
        reported = [row["phase"] for row in self.folder.history() if row["event"] == "phase"]
        if number not in reported:
            last = max(step, phase.config.steps)
            result = phase_result(self.folder.metrics(), number, last)
            model_row = describe_model(trainer, self.data, self.run.training.eval_sequences)
            row = {"event": "phase", "phase": number, "step": last, **asdict(result), **model_row}
            report_phase(self.run, row, self.folder, self.console)
        if interruption.came(trainer.world):
            raise interruption.stopped(
                f"after phase {number}, which is saved; resume with: {self.folder.resume_command}"
            )

    def save_start(self, trainer: Trainer) -> None:
        """Save the model that the run starts from, so that resuming does not need the original."""
        phase = get_phase(self.run, self.run.first_phase)
        weights, _ = trainer.lazy_state()
        state = phase_state(self.run, phase, 0, self.backend.name)
        self.folder.save(trainer.config, state, weights, None, self.run.training.keep_checkpoints)

    def cross_boundary(self, phase: int, trainer: Trainer) -> Trainer:
        """Transfer a phase's model to the next phase, and raise TrainingStopped if that changed it."""
        after = get_phase(self.run, phase + 1)
        assert after.transfer is not None
        plain = self._trainer(*merge_lora(trainer.config, trainer.weights())) if trainer.config.lora else trainer
        by_centroids = getattr(after.config, "router_init", None) == "centroids"
        routers = self._centroids(plain, after) if by_centroids else None
        plan = after.transfer.plan(plain.config, after.config, self.run.seed, routers)
        # A starting model has no moments yet, and moments of adapters end with them.
        carry = self.run.optimizer.transfer == "carry" and phase >= self.run.first_phase and not self.run.lora.rank
        grown = plain.apply_transfer(plan, carry)
        limits, width, is_published = self.run.verification, trainer.config.context_length, self.run.start is not None
        width = min(width, PROBE_TOKENS) if is_published else width
        probes = fixed_windows(self.data.validation, limits.probe_sequences, width)
        certificate = certify(limits, trainer, grown, probes, widened=is_published)
        self.console.boundary(f"Boundary {phase}-{after.number}: {after.transfer.noun}", certificate)
        if getattr(after.config, "router_init", None) == "zero":
            self.console.warn(ZERO_ROUTER_WARNING)
        if plan.is_lossy:
            self.console.warn(LOSSY_METHOD)
        allow_lossy = self.options.allow_lossy or plan.is_lossy
        record = certificate.to_json() | {"allowed_lossy": not certificate.passed and allow_lossy}
        file = self.folder.save_boundary(f"{phase}-{phase + 1}", record)
        if not certificate.passed and not allow_lossy:
            raise TrainingStopped(
                f"boundary {phase}-{phase + 1} changed the model (see {file}); phase {phase + 1} was not started; to "
                f"start it anyway: {resume_command(self.folder.path, '--allow-lossy')}",
                exit_code=1,
            )
        # Log before saving step 0: resuming without that checkpoint drops this row and crosses again; with it, both
        # exist.
        self.folder.log_event({"event": "boundary", "phase": phase + 1, **record})
        state = phase_state(self.run, after, 0, self.backend.name)
        grown = self._adapted(grown, phase + 1)
        weights, optimizer_state = grown.lazy_state()
        moments = optimizer_state if carry else None
        self.folder.save(grown.config, state, weights, moments, self.run.training.keep_checkpoints)
        return grown

    def _centroids(self, trainer: Trainer, after: Phase) -> Routers:
        """Return routers on evenly spaced windows of the training data, computed on rank 0 and broadcast."""
        assert isinstance(after.config, UpcyclePhaseConfig)
        config, phase, world, weights = trainer.config, after.config, trainer.world, trainer.weights()
        found = b""
        if world.rank == 0:
            n = -(-centroid_tokens(phase) // config.context_length)
            tokens_BT = fixed_windows(self.data.train, n, config.context_length)[:, :-1]
            dense = self.backend.streamed(config, weights, self.options.device)
            routers = centroid_routers(dense, phase, tokens_BT, self.run.seed)
            found = np.array(list(routers.values())).tobytes()
        rows_LED = np.frombuffer(world.broadcast(found), np.float32).reshape(-1, phase.n_experts, config.d_model)
        return dict(zip(after.model.expert_layers, rows_LED, strict=True))

    def _adapted(self, trainer: Trainer, phase: int) -> Trainer:
        """Return the trainer with fresh adapters, if the run trains adapters."""
        model = trained_model(self.run, phase)
        if model.lora is None:
            return trainer
        return self._trainer(model, trainer.weights() | start_adapters(model, self.run.seed))

    def _first_weights(self) -> Weights:
        if self.run.start is None:
            return initialize(self.run.model, self.run.seed)
        source = self.options.open_model(Path(self.run.start.model))
        check_model(self.run, source)
        began = self.folder.identity()
        if began is not None and began.start_sha256 not in (None, weights_sha256(source.path)):
            raise InputError(
                f"cannot resume {self.folder.path}: {source.path} holds other weights than the run began with; "
                "restore them, or begin another run"
            )
        return source.weights

    def _trainer(self, model: ModelConfig, weights: Weights) -> Trainer:
        return self.backend.trainer(model, weights, self.run.optimizer, self.options.device, self.run.engine)


def open_run(directory: Path, world: ProcessGroup = SingleProcess()) -> RunConfig:
    """Return the config of a run to resume. Raises InputError if there is none."""
    return RunFolder(directory, world).open()


def prepare_experiment(
    run: RunConfig, folder: RunFolder, backend: Backend, last_phase: int, options: Options, console: Console
) -> Experiment:
    """Prepare the data and fit the vocabulary to it. Leaves the run's folder alone, so bad input leaves no trace."""
    check_installed(run.training.tracker)
    get_phases(run, range(run.first_phase, last_phase + 1))  # reject inexact growth before hours of training
    _check_batch(run, folder.world)
    data = prepare(run.data, progress=console.line)
    folder.check_data(data)
    run = fit_vocabulary(_with_absolute_paths(run), data.tokenizer.vocab_size)
    check_length(data.train, run.model.context_length, "train")
    check_length(data.validation, run.model.context_length, "validation")
    return Experiment(run, folder, backend, options, console, data)


def _check_batch(run: RunConfig, world: ProcessGroup) -> None:
    batch_size, shares = run.training.batch_size, world.size * run.engine.accumulation_steps
    if batch_size % shares:
        raise InputError(
            f"training.batch_size {batch_size} does not come in {shares} equal parts: {world.size} processes times "
            f"engine.accumulation_steps {run.engine.accumulation_steps}; take {-(-batch_size // shares) * shares}"
        )


def _with_absolute_paths(run: RunConfig) -> RunConfig:
    """Return the run with absolute paths, so that it can be resumed from another folder."""
    named = {"source": run.data.source, "tokenizer": run.data.tokenizer}
    paths = {key: Path(name).expanduser() for key, name in named.items() if name not in (*BUILTIN, "char")}
    found = {key: str(path.resolve()) for key, path in paths.items() if path.exists()}
    return run.model_copy(update={"data": run.data.model_copy(update=found)})


def fit_vocabulary(run: RunConfig, vocab_size: int) -> RunConfig:
    """Set the model's vocabulary to the tokenizer's, unless it was given; then it must hold all tokens."""
    if run.data.fit_vocabulary:
        return run.model_copy(update={"model": run.model.model_copy(update={"vocab_size": vocab_size})})
    if run.model.vocab_size < vocab_size:
        raise InputError(
            f"model.vocab_size {run.model.vocab_size} is smaller than the tokenizer's {vocab_size}; "
            f"leave model.vocab_size out, or take at least {vocab_size}"
        )
    return run
