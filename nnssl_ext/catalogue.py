"""What exists, without loading torch: names come from reading source files, classes are imported only when asked for."""

from __future__ import annotations

import ast
import importlib
from functools import cache
from pathlib import Path
from typing import Any

from nnssl_ext.errors import unknown_name

PRETRAINING = "nnssl_ext.trainers.pretraining"


@cache
def pretraining_methods() -> dict[str, str]:
    """Method name (the class, as ``-tr`` takes it) -> module, one per file of ``trainers/pretraining/``."""
    found = {}
    (folder,) = importlib.import_module(PRETRAINING).__path__
    for source in sorted(Path(folder).glob("[!_]*.py")):
        for node in ast.parse(source.read_text()).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith("Trainer"):
                found[node.name] = f"{PRETRAINING}.{source.stem}"
    return found


def load_method(name: str) -> Any:
    """The method class of that name.

    Raises:
        NnsslError: unknown name, answered with the nearest one.
    """
    methods = pretraining_methods()
    if name not in methods:
        raise unknown_name("pretraining method", name, methods)
    return getattr(importlib.import_module(methods[name]), name)
