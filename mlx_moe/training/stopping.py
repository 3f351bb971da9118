"""Early end of a run: signals, and the error that reports it."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from mlx_moe.errors import Error
from mlx_moe.processes import ProcessGroup

# Default handlers. A shell starts background jobs with SIGINT ignored, but a SIGINT that is sent is meant; nohup
# ignores SIGHUP on purpose.
SIGNALS: dict[signal.Signals, Callable[[int, FrameType | None], Any] | signal.Handlers] = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,  # the terminal was closed
}


class TrainingStopped(Error):
    """The run ended early; the message says why and how to resume."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


@dataclass
class Interruption:
    """The signal that asks the run to stop, if any."""

    received: int | None = None  # received by this process
    number: int | None = None  # agreed on by all processes

    def came(self, world: ProcessGroup) -> bool:
        """Return whether any process has received a signal; all processes call this at the same place and agree."""
        self.number = world.all_reduce_max(self.received or 0) or None
        return self.number is not None

    @property
    def name(self) -> str | None:
        return None if self.number is None else signal.Signals(self.number).name

    def stopped(self, where: str) -> TrainingStopped:
        return TrainingStopped(f"{self.name}: stopped {where}", exit_code=128 + (self.number or 0))


@contextmanager
def interruptions() -> Iterator[Interruption]:
    """Record SIGINT, SIGTERM and SIGHUP, so that current work can finish; a second signal ends the program at once."""
    interruption, handled = Interruption(), _handled()

    def receive(number: int) -> None:
        interruption.received = number
        for either in handled:
            signal.signal(either, SIGNALS[either])

    with _handling(receive):
        yield interruption


@contextmanager
def stopping_at_once() -> Iterator[None]:
    """Raise TrainingStopped on SIGINT, SIGTERM and SIGHUP, while there is nothing to save."""
    interruption = Interruption()

    def receive(number: int) -> None:
        interruption.number = number
        raise KeyboardInterrupt  # libraries do not catch this one

    with _handling(receive):
        try:
            yield
        except KeyboardInterrupt:
            raise interruption.stopped("before training began; nothing was lost") from None


def _handled() -> list[signal.Signals]:
    is_nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [number for number in SIGNALS if number != signal.SIGHUP or not is_nohup]


@contextmanager
def _handling(receive: Callable[[int], None]) -> Iterator[None]:
    previous = {number: signal.getsignal(number) for number in _handled()}

    def handle(number: int, frame: FrameType | None) -> None:
        receive(number)

    for number in previous:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
