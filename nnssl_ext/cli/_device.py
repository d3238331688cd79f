"""Where commands compute."""

from __future__ import annotations

from typing import Literal

Device = Literal["cuda", "cpu", "mps"]


def device_name(asked: Device | None) -> Device:
    """The device that ``-device`` asks for; without it cuda where there is one, else cpu."""
    from nnssl_ext.reports.machine import best_device

    return asked or best_device()
