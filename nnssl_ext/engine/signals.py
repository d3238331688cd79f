"""Ending politely: SIGTERM and SIGUSR1 (what SLURM sends before requeueing) ask a run to stop after its step."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Remembers the signal that asked the run to stop."""

    def __init__(self) -> None:
        self.signal_name = ""

    def __bool__(self) -> bool:
        return bool(self.signal_name)


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Within the block, SIGTERM and SIGUSR1 set the yielded request instead of ending the process."""
    request = StopRequest()

    def remember(number: int, frame: FrameType | None) -> None:
        request.signal_name = signal.Signals(number).name

    names = [name for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]
    before = {name: signal.signal(getattr(signal, name), remember) for name in names}
    try:
        yield request
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)
