"""Which of our classes stock nnU-Net may ask for, read off their names: adding one is writing it.

A class counts when it stands at the top level of a module of `ROOMS`, its name begins with ``nnssl`` (stock names are
never shadowed) and contains one of `KINDS`. Sources are searched as text, so nothing is imported and a module that
cannot be imported is still known, and answers with its own error when nnU-Net asks for it.
"""

from __future__ import annotations

import re
from functools import cache
from importlib import import_module
from pathlib import Path

ROOMS = ("nnssl_ext.planners", "nnssl_ext.trainers.finetuning")

# What a class is, by its name -> the `current_module` with which nnU-Net 2.8.1 asks for such classes.
KINDS = {
    "Planner": "nnunetv2.experiment_planning",
    "FingerprintExtractor": "nnunetv2.experiment_planning",
    "Preprocessor": "nnunetv2.preprocessing",
    "Normalization": "nnunetv2.preprocessing.normalization",
    "Trainer": "nnunetv2.training.nnUNetTrainer",
}

_CLASS = re.compile(rf"^class (nnssl\w*?({'|'.join(KINDS)})\w*)", re.MULTILINE)


@cache
def registry() -> dict[tuple[str | None, str], str]:
    """``(current_module, class name)`` -> ``"module:attribute"``."""
    found: dict[tuple[str | None, str], str] = {}
    for room in ROOMS:
        (folder,) = import_module(room).__path__
        for source in sorted(Path(folder).glob("*.py")):
            for name, kind in _CLASS.findall(source.read_text(encoding="utf-8")):
                found[KINDS[kind], name] = f"{room}.{source.stem}:{name}"
    return found
