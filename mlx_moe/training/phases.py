"""The experiment: a dense model, upcycled to experts, grown wider and deeper, each boundary proven lossless."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx_moe import config as configs
from mlx_moe.accounting import count_parameters
from mlx_moe.config import ModelConfig, RunConfig
from mlx_moe.data.sources import BUILTIN
from mlx_moe.data.tokens import TokenData, check_length, fixed_windows, prepare
from mlx_moe.errors import InputError
from mlx_moe.parameters import Arrays, initialize
from mlx_moe.training import checkpoint, log
from mlx_moe.training.backend import Backend, Trainer
from mlx_moe.training.boundary import certify, phase_config, phase_model, plan_boundary
from mlx_moe.training.checkpoint import TrainerState
from mlx_moe.training.console import Console
from mlx_moe.training.generation import generate
from mlx_moe.training.loop import Phase, TrainingStopped, load_imbalance, phase_result, train_phase
from mlx_moe.transfer.upcycling import ZERO_ROUTER_WARNING
from mlx_moe.validation import read_mapping, validate

PROMPTS = (
    "Once upon a time, there was a little",
    "One day, a girl named Lily went to",
    "The dog was very happy because",
)
SAMPLE_TOKENS = 40


def train(run: RunConfig, directory: Path, backend: Backend, n_phases: int, options: Options, console: Console) -> None:
    """Run phases 1 to `n_phases` in a run's directory, or go on where its latest checkpoint stands.

    Raises InputError on what a user can mend, TrainingStopped on an interruption, a loss that is not finite, or a
    boundary that failed.
    """
    experiment = begin(run, directory, backend, n_phases, options, console)
    phase, trainer, step = experiment.where_it_stands()
    experiment.introduce(trainer)
    while True:
        experiment.train(phase, trainer, step)
        if phase >= n_phases:
            break
        trainer = experiment.cross_boundary(phase, trainer)
        phase, step = phase + 1, 0
    experiment.summarize()


@dataclass(frozen=True)
class Options:
    """What belongs to this call and not to the run."""

    device: str = "auto"
    allow_lossy: bool = False


@dataclass(frozen=True)
class Experiment:
    run: RunConfig
    directory: Path
    backend: Backend
    options: Options
    console: Console
    data: TokenData

    def where_it_stands(self) -> tuple[int, Trainer, int]:
        """(phase, trainer, steps done in it): the latest checkpoint, or a new dense model."""
        saved = checkpoint.latest(self.directory)
        if saved is None:
            trainer = self._trainer(self.run.model, initialize(self.run.model, self.run.seed))
            return 1, trainer, 0
        loaded = checkpoint.load(saved)
        trainer = self._trainer(loaded.config, loaded.weights)
        if loaded.optimizer_state is not None:
            trainer.load_optimizer_state(loaded.optimizer_state)
        for name in ("metrics.jsonl", "history.jsonl"):
            log.rewind(self.directory / name, loaded.state.phase, loaded.state.step)
        self.console.line(f"resuming from {saved.relative_to(self.directory)}")
        return loaded.state.phase, trainer, loaded.state.step

    def introduce(self, trainer: Trainer) -> None:
        """Write down what the run is, and say it."""
        self.directory.mkdir(parents=True, exist_ok=True)
        configs.save(self.run, self.directory / "config.yaml")
        self.data.tokenizer.save(self.directory / "tokenizer")
        (self.directory / "data.json").write_text(json.dumps(self.data.provenance, indent=2) + "\n", encoding="utf-8")
        log.write_environment(self.directory / "environment.json", self.backend, trainer)
        tokens = {name: self.data.provenance[name]["tokens"] for name in ("train", "validation")}
        self.console.facts(
            [
                ("run", f"{self.run.name}, seed {self.run.seed}, in {self.directory}"),
                ("backend", f"{self.backend.reason}; device {trainer.device}"),
                ("data", self.data.provenance["source"]["description"]),
                ("tokens", f"{tokens['train']:,} to train on, {tokens['validation']:,} held out"),
                ("tokenizer", f"{self.run.data.tokenizer}, {self.data.tokenizer.vocab_size:,} tokens"),
            ]
        )

    def train(self, number: int, trainer: Trainer, step: int) -> None:
        phase = Phase(number, phase_config(self.run, number))
        if step < phase.config.steps:
            self.console.title(phase.title)
            self.console.parameters(count_parameters(trainer.config), trainer.config.display_name)
            self.console.line()
            train_phase(self.run, phase, trainer, self.data, self.directory, step, self.console, self.backend.name)
        reported = [row["phase"] for row in self._history() if row["event"] == "phase"]
        if number not in reported:
            self._report(phase, trainer)

    def cross_boundary(self, phase: int, trainer: Trainer) -> Trainer:
        """Upcycle after phase 1, grow after phase 2; go on only if nothing changed."""
        plan = plan_boundary(self.run, phase, trainer.config)
        grown = trainer.transferred(plan)
        limits = self.run.verification
        probes = fixed_windows(self.data.validation, limits.probe_sequences, trainer.config.context_length)
        certificate = certify(limits, trainer, grown, probes)
        verb = "upcycling" if phase == 1 else "growth"
        self.console.boundary(f"Boundary {phase}-{phase + 1}: {verb}", certificate)
        if phase == 1 and self.run.phases.moe.router_init == "zero":
            self.console.warn(ZERO_ROUTER_WARNING)
        record = certificate.to_json() | {"allowed_lossy": not certificate.passed and self.options.allow_lossy}
        file = self.directory / "boundaries" / f"{phase}-{phase + 1}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        if not certificate.passed and not self.options.allow_lossy:
            raise TrainingStopped(
                f"boundary {phase}-{phase + 1} changed the model (see {file}); phase {phase + 1} was not started; "
                "--allow-lossy goes on all the same",
                exit_code=1,
            )
        log.append(self.directory / "history.jsonl", {"event": "boundary", "phase": phase + 1, **record})
        path = checkpoint.folder(self.directory, phase + 1, 0)
        state = TrainerState(phase + 1, 0, self.backend.name)
        checkpoint.save(path, grown.config, state, grown.weights(), None)
        return grown

    def summarize(self) -> None:
        """The table of all phases and boundaries so far."""
        history = self._history()
        self.console.title("Summary")
        boundaries = [row for row in history if row["event"] == "boundary"]
        if boundaries:
            self.console.table(
                ["boundary", "max |Δlogit|", "last loss before", "first loss after", "jump", "verdict"],
                [
                    [
                        f"{row['phase'] - 1}-{row['phase']}",
                        f"{row['max_logit_difference']:.1e}",
                        f"{row['loss_before']:.5f}",
                        f"{row['loss_after']:.5f}",
                        f"{row['loss_jump']:+.1e}",
                        "lossless" if row["passed"] else "lossy",
                    ]
                    for row in boundaries
                ],
            )
        self.console.table(
            ["phase", "parameters", "first loss", "last loss", "drop", "validation", "drop"],
            [
                [
                    checkpoint.PHASE_FOLDERS[row["phase"]],
                    f"{row['parameters']['total'] / 1e6:,.2f} M",
                    f"{row['first_loss']:.4f}",
                    f"{row['last_loss']:.4f}",
                    f"{row['first_loss'] - row['last_loss']:.4f}",
                    f"{row['last_validation_loss']:.4f}",
                    f"{row['first_validation_loss'] - row['last_validation_loss']:.4f}",
                ]
                for row in history
                if row["event"] == "phase"
            ],
        )
        self.console.line(f"everything is in {self.directory}")

    def _history(self) -> list[dict[str, Any]]:
        return log.read(self.directory / "history.jsonl")

    def _trainer(self, model: ModelConfig, weights: Arrays) -> Trainer:
        return self.backend.trainer(model, self.run.optimizer, weights, self.options.device, self.run.engine)

    def _report(self, phase: Phase, trainer: Trainer) -> None:
        result = phase_result(self.directory, phase.number)
        facts = [
            (
                "loss",
                f"{result.first_loss:.4f} -> {result.last_loss:.4f} (drop {result.first_loss - result.last_loss:.4f})",
            ),
            (
                "validation",
                f"{result.first_validation_loss:.4f} -> {result.last_validation_loss:.4f} "
                f"(drop {result.first_validation_loss - result.last_validation_loss:.4f})",
            ),
            ("tokens", f"{result.tokens:,} in {result.seconds:.0f} s of steps"),
        ]
        row = {"event": "phase", "phase": phase.number, "step": phase.config.steps, **asdict(result)}
        row["parameters"] = count_parameters(trainer.config).to_json()
        probes = fixed_windows(self.data.validation, self.run.training.eval_sequences, trainer.config.context_length)
        expert_load_LE = trainer.expert_load(probes[:, :-1])
        if expert_load_LE is not None:
            row["validation_expert_load"] = expert_load_LE.tolist()
            row["load_imbalance"] = load_imbalance(expert_load_LE)
            row["dead_experts"] = int((expert_load_LE == 0).sum())
            facts.append(
                ("expert load", f"max/mean {row['load_imbalance']:.2f} in the worst layer, {row['dead_experts']} dead")
            )
        samples = [self._sample(trainer, prompt) for prompt in PROMPTS]
        self.console.title(f"{phase.title}, results")
        self.console.facts(facts)
        with (self.directory / "samples.md").open("a", encoding="utf-8") as stream:
            stream.write(f"## {phase.title}\n\n")
            for prompt, continuation in zip(PROMPTS, samples, strict=True):
                self.console.line(f"  {prompt}{continuation}".replace("\n", " "))
                stream.write(f"**{prompt}**{continuation}\n\n")
        log.append(self.directory / "history.jsonl", row)

    def _sample(self, trainer: Trainer, prompt: str) -> str:
        tokenizer = self.data.tokenizer
        ids = generate(trainer, tokenizer.encode(prompt), SAMPLE_TOKENS, stop=tokenizer.eot_id)
        return tokenizer.decode(list(ids))


def open_run(directory: Path) -> RunConfig:
    """The config of a run to resume. Raises InputError where there is none."""
    if not (directory / "config.yaml").is_file():
        raise InputError(f"cannot resume {directory}: there is no config.yaml in it; name a run's folder")
    return validate(RunConfig, read_mapping(directory / "config.yaml"))


def begin(
    run: RunConfig, directory: Path, backend: Backend, n_phases: int, options: Options, console: Console
) -> Experiment:
    """Prepare the data and fit the vocabulary to it. Writes nothing, so that bad input leaves nothing behind."""
    for phase in range(2, n_phases + 1):
        phase_model(run, phase)  # refuses growth that is not exact, before hours of training
    data = prepare(run.data, progress=console.line)
    run = fit_vocabulary(_with_absolute_paths(run), data.tokenizer.vocab_size)
    for tokens in (data.train, data.validation):
        check_length(tokens, run.model.context_length)
    return Experiment(run, directory, backend, options, console, data)


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
