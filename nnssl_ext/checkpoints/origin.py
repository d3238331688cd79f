"""Which cases a checkpoint learnt from, as far as can be told. Checkpoints name none: they are shared."""

from __future__ import annotations

from pathlib import Path

from nnssl_ext.files import read_json


def pretraining_cases(checkpoint: Path) -> tuple[str, set[str]] | None:
    """Dataset and case names, from the ``settings.json`` that `nnssl_train` leaves beside its checkpoints; None without it.

    Raises:
        NnsslError: that file is damaged.
    """
    settings = checkpoint.parent / "settings.json"
    if not settings.is_file():
        return None
    content = read_json(settings)
    return str(content.get("dataset", "")), set(content.get("cases", ()))
