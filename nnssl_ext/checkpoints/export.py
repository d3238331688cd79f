"""A checkpoint as a folder for strangers, in the layout of OpenMind's repositories and a little more."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnssl_ext.checkpoints.adapt import MARK
from nnssl_ext.checkpoints.io import load_checkpoint, save_checkpoint
from nnssl_ext.checkpoints.safetensors_file import write_safetensors
from nnssl_ext.checkpoints.schema import check, kind_of
from nnssl_ext.checkpoints.source import CHECKPOINT, SAFETENSORS, SUMS, name_of
from nnssl_ext.checkpoints.summary import summarise
from nnssl_ext.errors import NnsslError
from nnssl_ext.files import atomic_write, sha256_of, write_json
from nnssl_ext.plans import FINETUNING, configuration_of

CARD, PLANS, ADAPTATION, CONFIG = "README.md", "plans.json", "adaptation_plan.json", "config.json"
HASHED = (SAFETENSORS, CHECKPOINT, PLANS, ADAPTATION, CONFIG)
FILES = (*HASHED, SUMS, CARD)
"""What a folder consists of. The card has no hash, so that its author can go on writing it."""

PRIVATE = (FINETUNING, MARK)
"""Parts of plans that say how somebody fine-tuned."""
UNKNOWN = "unknown"
"""The hub's name for a licence that nobody stated."""


def export(source: str | os.PathLike[str], folder: Path, licence: str = UNKNOWN, repository: str | None = None) -> None:
    """Write the folder; its `SUMS` last, so a folder without them is unfinished.

    Optimiser, random states and everything else that only continues the run stay behind. File name and hash of `SUMS` are
    those that ``sha256sum -c`` takes.

    Args:
        source: a checkpoint of ours, as `source.checkpoint_file` takes it.
        folder: new, empty, or an earlier export, which is replaced.
        licence: the hub's identifier of the weights' licence, such as ``apache-2.0`` or ``cc-by-sa-4.0``.
        repository: ``OWNER/NAME`` where it is going to be, for the card.

    Raises:
        NnsslError: not a checkpoint of ours, an impossible licence or repository, or a folder that holds something else or cannot
            be written.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", licence):
        raise NnsslError(
            f"'{licence}' is no licence identifier of the Hugging Face hub", "e.g. apache-2.0, cc-by-sa-4.0, other"
        )
    if repository is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise NnsslError(f"'{repository}' is no repository", "give OWNER/NAME")
    content = _shared(load_checkpoint(source), name_of(source))
    _claim(folder)
    write_safetensors(folder / SAFETENSORS, content)
    save_checkpoint(folder / CHECKPOINT, content)
    write_json(folder / PLANS, content["nnssl_ext"]["plans"])
    write_json(folder / ADAPTATION, content["nnssl_adaptation_plan"])
    summary = summarise(content, CHECKPOINT)
    write_json(folder / CONFIG, summary)
    _write(folder / CARD, model_card(content, summary, licence, repository))
    _write(folder / SUMS, "".join(f"{sha256_of(folder / name)}  {name}\n" for name in HASHED))


def model_card(
    content: Mapping[str, Any], summary: Mapping[str, Any], licence: str = UNKNOWN, repository: str | None = None
) -> str:
    """The model card: YAML front matter as the hub reads it, then Markdown.

    Args:
        content: a checkpoint of ours.
        summary: of it.
        licence, repository: as in `export`.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    ours = content["nnssl_ext"]
    found = configuration_of(ours["plans"], ours["configuration"])
    network = summary["architecture"]["network_class_name"]
    preset = found.get("nnssl", {}).get("preset")
    method = ours["method"].removesuffix("Trainer")
    schemes = found["normalization_schemes"]
    citations = [
        {
            "heading": f"{citation.get('type', 'Paper')}, {citation.get('name', '?')}",
            "papers": citation.get("apa_citations") or citation.get("bibtex_citations") or [],
        }
        for citation in content["citations"]
    ]
    environment = Environment(
        loader=PackageLoader("nnssl_ext.checkpoints", "."), undefined=StrictUndefined, keep_trailing_newline=True
    )
    return environment.get_template("model_card.md.j2").render(
        licence=licence,
        tags=["medical-imaging", "3d", "self-supervised-learning", "nnu-net", method.lower()],
        title=repository.split("/")[1] if repository else f"{preset or network.rsplit('.', 1)[-1]} {method}",
        source=f"hf:{repository or 'OWNER/NAME'}",
        network=f"{network.rsplit('.', 1)[-1]} ({preset})" if preset else network.rsplit(".", 1)[-1],
        method=method,
        parameters=summary["parameters"],
        pretrained=summary["parameters"] - sum(m["not_pretrained"] for m in summary["modules"].values()),
        plans=ours["plans"]["plans_name"],
        configuration=ours["configuration"],
        needs_plugin=network.startswith("nnssl_ext.")
        or any(name.startswith("nnssl") for name in (found["preprocessor_name"], *schemes)),
        channels=ours["input_channels"],
        patch=" x ".join(map(str, found["patch_size"])),
        spacing=" x ".join(f"{mm:g}" for mm in found["spacing"]),
        schemes=schemes,
        data=ours["data"],
        adapted_from=ours.get("adapted_from"),
        progress=ours["progress"],
        version=ours["version"],
        settings=json.dumps(ours["settings"], indent=2),
        citations=citations,
    )


def _shared(content: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """The entries of a checkpoint of ours that others need. How its author fine-tuned is not among them."""
    if kind_of(content, origin) != "nnssl_ext":
        raise NnsslError(
            f"{origin} was not written by nnssl-ext",
            "share files of nnssl, OpenMind and nnU-Net as their authors do, or run nnssl_adapt and export its checkpoint",
        )
    check(content, origin)
    plans = {key: value for key, value in content["nnssl_ext"]["plans"].items() if key not in PRIVATE}
    shared = {key: content[key] for key in ("network_weights", "nnssl_adaptation_plan", "citations")}
    return {**shared, "nnssl_ext": {**content["nnssl_ext"], "plans": plans}}


def _claim(folder: Path) -> None:
    """Make sure that `folder` is ours, and unfinished from now on."""
    if folder.exists() and (not folder.is_dir() or {path.name for path in folder.iterdir()} - set(FILES)):
        raise NnsslError(f"{folder} holds something else than an export", "choose a new folder with -o")
    (folder / SUMS).unlink(missing_ok=True)


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
