"""Where commands compute."""

from __future__ import annotations

from typing import Literal

Device = Literal["cuda", "cpu", "mps"]


def device_name(asked: Device | None) -> Device:
    """The device that ``-device`` asks for; without it cuda where there is one, else cpu."""
    import torch

    return asked or ("cuda" if torch.cuda.is_available() else "cpu")
