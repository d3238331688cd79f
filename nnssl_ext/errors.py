"""Errors that carry the scene and the fix, and the nearest-name helper."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class NnsslError(Exception):
    """Something the user can mend.

    Args:
        what: what was attempted and what is wrong, naming case, file or setting.
        fix: what to do about it, as an instruction.
    """

    def __init__(self, what: str, fix: str = "") -> None:
        self.what, self.fix = what, fix
        super().__init__(f"{what}\n  -> {fix}" if fix else what)

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.what, self.fix)  # survives the trip out of a worker process


def unknown_name(kind: str, name: str, known: Iterable[str]) -> NnsslError:
    """An error for a name that is not in `known`, answered with the nearest one and the full list."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return NnsslError(f"unknown {kind} '{name}'", f"{hint}known: {', '.join(names) or 'none'}")
