"""The terminal that commands print tables to."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

PIPED_WIDTH = 200
"""Columns where there is no terminal: rich would assume 80 and cut the names of weights short."""


def console() -> Console:
    """A console as wide as the terminal, or wide enough for a table in a file or pipe."""
    from rich.console import Console

    return Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else PIPED_WIDTH)
