"""How a run ends before its time: signals, and what they wait for."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from mlx_moe.errors import Error
from mlx_moe.processes import ProcessGroup

# What they do by default. A shell starts its background jobs with SIGINT ignored, but who sends one means it; SIGHUP is
# ignored where nohup asked for that.
SIGNALS: dict[signal.Signals, Callable[[int, FrameType | None], Any] | signal.Handlers] = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,  # the terminal was closed
}


class TrainingStopped(Error):
    """The run ended before its time; the message says why and how to go on."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


@dataclass
class Interruption:
    """The signal that asks the run to stop, if one came."""

    received: int | None = None  # by this process
    number: int | None = None  # as all of them have heard

    def came(self, world: ProcessGroup) -> bool:
        """Whether one has come to any of the processes: all ask, at the same place, and all hear the same."""
        self.number = world.all_reduce_max(self.received or 0) or None
        return self.number is not None

    @property
    def name(self) -> str | None:
        return None if self.number is None else signal.Signals(self.number).name

    def stopped(self, where: str) -> TrainingStopped:
        return TrainingStopped(f"{self.name}: stopped {where}", exit_code=128 + (self.number or 0))


@contextmanager
def interruptions() -> Iterator[Interruption]:
    """Note SIGINT, SIGTERM and SIGHUP, so that the work at hand can finish; a second one ends the program at once."""
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
        raise KeyboardInterrupt  # which no library on the way takes for a failure of its own

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
