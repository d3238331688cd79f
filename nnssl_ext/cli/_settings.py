"""Settings as flags."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

Settings = TypeVar("Settings")

SHARED = re.compile(r"^( +)(\w+(?:, \w+)+): (.*\n(?:\1 +.*\n)*)", re.MULTILINE)
"""Several attributes described together: indentation, names, what is said of them."""


def settings_from_flags(default: Settings, flags: Sequence[str], command: str) -> Settings:
    """The settings with what the flags change; unknown flags end the program with tyro's message.

    Args:
        default: an instance of a settings dataclass.
        flags: e.g. ``["--mask_ratio", "0.6", "--optim.lr", "1e-4"]``, or ``["-h"]``.
        command: what to call the program in messages.
    """
    import tyro

    describe_each(default)
    return tyro.cli(type(default), default=default, args=list(flags), use_underscores=True, prog=command)


def describe_each(settings: Any) -> None:
    """Let the docstrings of a settings dataclass, and of those in it, describe every attribute on its own: tyro's help knows no
    attributes that are described together."""
    kind = type(settings)
    kind.__doc__ = SHARED.sub(
        lambda found: "".join(f"{found[1]}{name}: {found[3]}" for name in found[2].split(", ")), kind.__doc__ or ""
    )
    for value in (getattr(settings, field.name) for field in fields(settings)):
        if is_dataclass(value):
            describe_each(value)
