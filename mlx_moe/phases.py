"""The phases of a run: numbers, folders, models, and lineage.

Phases are numbered from 1 in the order of the config. A run that starts from a model may begin with a later one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mlx_moe.config import ModelConfig, PhaseConfig, RunConfig
from mlx_moe.errors import InputError
from mlx_moe.storage.checkpoint import TrainerState, phase_folder
from mlx_moe.transfer.registry import Transfer, transfer_of

MIXTURE_TITLE = "mixture of experts"


@dataclass(frozen=True)
class Phase:
    """A phase of a run, with the model that it trains (without adapters)."""

    number: int
    name: str
    config: PhaseConfig
    model: ModelConfig
    transfer: Transfer | None  # from the previous phase's model; None if the phase trains that model unchanged
    is_from_scratch: bool = False  # trains newly initialised weights

    @property
    def folder(self) -> str:
        """Name of the phase's folder, such as `2-moe`."""
        return phase_folder(self.number, self.name)

    @property
    def kind(self) -> str:
        """Kind of the model in a few words, such as `mixture of experts`."""
        if self.transfer is None:
            kind = MIXTURE_TITLE if self.model.moe else "dense"
            return f"{kind} from scratch" if self.is_from_scratch and self.model.moe else kind
        return f"{self.transfer.adjective}{MIXTURE_TITLE if self.model.moe else 'dense model'}"

    @property
    def label(self) -> str:
        """Number and kind, as short as a figure needs them, such as `3: larger experts`."""
        adjective = self.transfer.adjective if self.transfer else ""
        return f"{self.number}: {adjective}{'experts' if self.model.moe else 'dense'}"

    @property
    def title(self) -> str:
        """Heading of the phase, such as `Phase 2: mixture of experts`."""
        return f"Phase {self.number}: {self.kind}"


def phase_config(run: RunConfig, number: int) -> PhaseConfig:
    """Return the settings of a phase by its number, counted from 1."""
    return list(run.phases.values())[number - 1]


def phase_numbers(run: RunConfig) -> range:
    """Return the numbers of the phases that a run may train: all, or those of its `start`."""
    return range(run.first_phase, (run.start.phases[-1] if run.start else len(run.phases)) + 1)


def start_phase(run: RunConfig) -> int:
    """Return the number of the phase that trains models like the run's initial one; 0 means before phase 1.

    If it is less than `run.first_phase`, the run begins with the transfer between the two.
    """
    transfer = transfer_of(phase_config(run, run.first_phase))
    applies = run.start is not None and transfer is not None and transfer.applies_to(run.model)
    return run.first_phase - 1 if applies else run.first_phase


def get_phase(run: RunConfig, number: int) -> Phase:
    """Return a phase with the model that it trains.

    Raises InputError if a transfer up to it is impossible: growth that is not exact, or upcycling of experts.
    """
    model, transfer = run.model, None
    for before in range(start_phase(run) + 1, number + 1):
        phase = phase_config(run, before)
        transfer = transfer_of(phase)
        assert transfer is not None
        if run.start is None and not transfer.applies_to(model):
            raise _nothing_to_do(run, before, model)
        try:
            model = transfer.target(model, phase)
        except InputError as error:
            raise InputError(*(f"phases.{list(run.phases)[before - 1]}: {line}" for line in error.lines)) from None
    is_from_scratch = run.start is None and number == 1
    return Phase(number, list(run.phases)[number - 1], phase_config(run, number), model, transfer, is_from_scratch)


def get_phases(run: RunConfig, numbers: Iterable[int] | None = None) -> list[Phase]:
    """Return the phases that a run may train, or those with the given numbers. Raises InputError as `get_phase`."""
    return [get_phase(run, number) for number in (phase_numbers(run) if numbers is None else numbers)]


def phase_model(run: RunConfig, number: int) -> ModelConfig:
    """Return the architecture that a run trains in a phase. Raises InputError as `get_phase`."""
    return run.model if number <= start_phase(run) else get_phase(run, number).model


def trained_model(run: RunConfig, number: int) -> ModelConfig:
    """Return `phase_model` with the run's adapters, if it trains any."""
    return phase_model(run, number).model_copy(update={"lora": run.lora if run.lora.rank else None})


def lineage(run: RunConfig, number: int) -> tuple[str, ...]:
    """Return the lineage of a phase's model; empty if the run initialised its weights."""
    if run.start is None:
        return ()
    done = [*run.start.lineage]
    for earlier in range(start_phase(run), number):
        if earlier >= run.first_phase:
            done.append(f"trained for {phase_config(run, earlier).steps:,} steps")
        phase = get_phase(run, earlier + 1)
        assert phase.transfer is not None
        done.append(became(phase.transfer, phase.model))
    return tuple(done)


def phase_state(
    run: RunConfig, phase: Phase, step: int, backend: str, validation_loss: float | None = None
) -> TrainerState:
    """Return the state of a run's checkpoint, `step` steps into a phase."""
    kind: str | None = getattr(phase.config, "transfer", None) if phase.transfer else None
    origin = lineage(run, phase.number)
    return TrainerState(phase.number, step, backend, validation_loss, origin, phase_name=phase.name, transfer=kind)


def lineage_so_far(state: TrainerState) -> tuple[str, ...]:
    """Return the lineage of a checkpoint, including the training in its own phase."""
    return (*state.lineage, f"trained for {state.step:,} steps") if state.step else state.lineage


def became(transfer: Transfer, model: ModelConfig) -> str:
    """Describe what a transfer did to a model, such as `upcycled to ...`."""
    return f"{transfer.participle} to {model.display_name}"


def check_start(run: RunConfig, source: str) -> None:
    """Raise InputError if a run's first phase does not fit the model that it starts from.

    A phase is for dense models or for experts, depending on what the phases before it make of a dense model.
    """
    first, has_experts = run.first_phase, run.model.moe is not None
    expected = _has_experts(run, first - 1)
    transfer = transfer_of(phase_config(run, first))
    is_fit = expected == has_experts if transfer is None or transfer.applies_to(run.model) else _has_experts(run, first)
    if is_fit:
        return
    n_experts = f"{run.model.moe.n_experts} experts" if run.model.moe else "no experts"
    wanted = [number for number in range(1, len(run.phases) + 1) if _fits(run, number)]
    advice = f"; take --phases {', or --phases '.join(map(str, wanted))}" if wanted else ""
    kind = "experts" if expected else "a dense model"
    raise InputError(
        f"--phases {first}: phase {first} ({list(run.phases)[first - 1]}) is for {kind}, and {source} has "
        f"{n_experts}{advice}"
    )


def _fits(run: RunConfig, number: int) -> bool:
    transfer = transfer_of(phase_config(run, number))
    if transfer is None or transfer.applies_to(run.model):
        return _has_experts(run, number - 1) == (run.model.moe is not None)
    return _has_experts(run, number)


def _has_experts(run: RunConfig, number: int) -> bool:
    """Return whether the phases up to a number turn a dense model into experts."""
    transfers = map(transfer_of, list(run.phases.values())[:number])
    return any(transfer is not None and transfer.gives_experts for transfer in transfers)


def _nothing_to_do(run: RunConfig, number: int, model: ModelConfig) -> InputError:
    n_experts = model.moe.n_experts if model.moe else 0
    if run.model.moe is None:
        return InputError(
            f"phases.{list(run.phases)[number - 1]}: the model has {n_experts} experts by then, so there is nothing to "
            "upcycle; leave the phase out"
        )
    return InputError(
        f"model.moe: the model starts with {n_experts} experts, so there is nothing to upcycle; train it with --phases "
        f"{number - 1}, or leave model.moe out"
    )
