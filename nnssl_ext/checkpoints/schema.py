"""What is in a checkpoint of ours, and how to tell whose checkpoint a file is. Loads no torch.

Everything in the file is a tensor or a plain Python value (`PLAIN`), so it loads with ``weights_only=True``. The first two
entries are what nnU-Net and nnssl read; everything of ours stands under ``nnssl_ext``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from nnssl_ext.errors import NnsslError

VERSION = 1
"""Raised when a reader of the previous schema would misunderstand a file."""

PLAIN = (str, bool, int, float, type(None))
"""Values allowed beside tensors, dicts with plain keys, lists and tuples."""

Kind = Literal["nnssl_ext", "nnssl", "nnunet"]


@dataclass(frozen=True)
class Entry:
    """One key of the schema; dots descend into dicts.

    Attributes:
        key, type: where it stands and what type its value has.
        meaning: one line.
        required: False for entries that only some files have.
    """

    key: str
    type: type | tuple[type, ...]
    meaning: str
    required: bool = True


SCHEMA = (
    Entry(
        "network_weights",
        dict,
        "CPU state dict of the network that the plans build, aliases included (nnU-Net reads it)",
    ),
    Entry("nnssl_adaptation_plan", dict, "how nnssl's readers take encoder and stem out of network_weights"),
    Entry("citations", list, "dicts {type, name, apa_citations}, in nnssl's format"),
    Entry("nnssl_ext.schema", int, "version of this schema"),
    Entry("nnssl_ext.version", str, "version of the package that wrote the file"),
    Entry("nnssl_ext.method", str, "pretraining method, the class name"),
    Entry("nnssl_ext.settings", dict, "all settings of the run"),
    Entry("nnssl_ext.plans", dict, "nnU-Net plans that build the network"),
    Entry("nnssl_ext.configuration", str, "configuration of these plans"),
    Entry("nnssl_ext.input_channels", int, "image channels of the network"),
    Entry("nnssl_ext.not_pretrained", list, "keys of network_weights that still are nnU-Net's own initialisation"),
    Entry(
        "nnssl_ext.data", dict, "summary of the training data: counts, spacings, dataset name; no case names, no paths"
    ),
    Entry("nnssl_ext.progress", dict, "epochs and steps done"),
    Entry(
        "nnssl_ext.adapted_from",
        dict,
        "by nnssl_adapt and nnssl_train: file, kind, method, patch_size, input_channels of the source",
        False,
    ),
    Entry("resume", dict, "optimiser, random states and method state (checkpoint_latest.pth only)", False),
)


def check(content: Mapping[str, Any], origin: str) -> None:
    """Compare a checkpoint of ours with the schema.

    Args:
        content: the loaded file.
        origin: what to call it in messages.

    Raises:
        NnsslError: an entry is missing or has another type, or the file is of a newer schema.
    """
    version = (content.get("nnssl_ext") or {}).get("schema", VERSION)
    if isinstance(version, int) and version > VERSION:
        raise NnsslError(
            f"{origin} has checkpoint schema {version}, this nnssl-ext reads up to {VERSION}", "upgrade nnssl-ext"
        )
    for entry in SCHEMA:
        found: Any = content
        for part in entry.key.split("."):
            found = found.get(part, _MISSING) if isinstance(found, Mapping) else _MISSING
        if found is _MISSING and not entry.required:
            continue
        if found is _MISSING:
            raise NnsslError(
                f"{origin} lacks '{entry.key}' ({entry.meaning})", "use a checkpoint that nnssl_train wrote"
            )
        if not isinstance(found, entry.type):
            raise NnsslError(
                f"{origin}: '{entry.key}' is {type(found).__name__}, expected {entry.type}",
                "use a checkpoint that nnssl_train wrote",
            )


def kind_of(content: Mapping[str, Any], origin: str) -> Kind:
    """Whose checkpoint this is: ours, nnssl's (OpenMind) or one that nnU-Net trained.

    Raises:
        NnsslError: none of these.
    """
    if "nnssl_ext" in content:
        return "nnssl_ext"
    trained_by_nnssl = "pretrain_json" in (content.get("init_args") or {})  # SparK files lack the adaptation plan
    if "network_weights" in content and ("nnssl_adaptation_plan" in content or trained_by_nnssl):
        return "nnssl"
    if "network_weights" in content and "init_args" in content:
        return "nnunet"
    keys = ", ".join(map(str, list(content)[:8])) or "none"
    raise NnsslError(
        f"{origin} is no checkpoint of nnssl-ext, nnssl or nnU-Net (top-level keys: {keys})",
        "give the checkpoint_final.pth that one of these wrote",
    )


_MISSING = object()
