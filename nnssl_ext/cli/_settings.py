"""Settings as flags."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

Settings = TypeVar("Settings")


def settings_from_flags(default: Settings, flags: Sequence[str], command: str) -> Settings:
    """The settings with what the flags change; unknown flags end the program with tyro's message.

    Args:
        default: an instance of a settings dataclass.
        flags: e.g. ``["--mask_ratio", "0.6", "--optim.lr", "1e-4"]``, or ``["-h"]``.
        command: what to call the program in messages.
    """
    import tyro

    return tyro.cli(type(default), default=default, args=list(flags), use_underscores=True, prog=command)
