"""From a checkpoint to plans of another data set, and a checkpoint for exactly these plans."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnssl_ext.checkpoints.content import assemble
from nnssl_ext.checkpoints.io import load_checkpoint, save_checkpoint
from nnssl_ext.checkpoints.nnssl_format import from_nnssl
from nnssl_ext.checkpoints.nnunet_format import from_nnunet
from nnssl_ext.checkpoints.pretrained import Pretrained, from_ours
from nnssl_ext.checkpoints.schema import kind_of
from nnssl_ext.checkpoints.source import name_of
from nnssl_ext.checkpoints.transfer import TransferTable, transfer
from nnssl_ext.errors import NnsslError
from nnssl_ext.files import read_json, write_json
from nnssl_ext.networks.build import build_network
from nnssl_ext.paths import folder
from nnssl_ext.plans import configuration_of, preprocessed_folder

CHECKPOINT, TABLE = "checkpoint_final.pth", "transfer.json"
MARK = "nnssl_adapted_from"
"""Block in adapted plans: which checkpoint they were made from. Plans without it are never overwritten."""


@dataclass(frozen=True)
class Adapted:
    """The outcome of an adaptation.

    Attributes:
        plans: plans of the target data set, one configuration.
        configuration: its name.
        content: the checkpoint for these plans, by `schema`.
        table: what became of every tensor.
        dataset_json: the target's.
        notes: what deserves a second look, one sentence each.
    """

    plans: dict[str, Any]
    configuration: str
    content: dict[str, Any]
    table: TransferTable
    dataset_json: dict[str, Any]
    notes: tuple[str, ...] = ()


def read_pretrained(
    source: str | os.PathLike[str], fix_nnssl_axes: bool = False, segmentation_models: bool = False
) -> Pretrained:
    """A pretraining checkpoint of ours, of nnssl or of OpenMind.

    Args:
        source: as `checkpoint_file` takes it.
        fix_nnssl_axes: see `from_nnssl`.
        segmentation_models: also take what nnU-Net trained, to pretrain further.

    Raises:
        NnsslError: missing, damaged or foreign file, or a model that nnU-Net trained where none is wanted.
    """
    content, name = load_checkpoint(source), name_of(source)
    kind = kind_of(content, name)
    if kind == "nnunet" and segmentation_models:
        return from_nnunet(content, name)
    if kind == "nnunet":
        raise NnsslError(
            f"{name} is a segmentation model that nnU-Net trained, not a pretraining checkpoint",
            "to fine-tune it: nnUNetv2_move_plans_between_datasets, then nnUNetv2_train -pretrained_weights",
        )
    if kind == "nnssl":
        return from_nnssl(content, name, fix_nnssl_axes)
    if fix_nnssl_axes:
        raise NnsslError(f"{name} was not written by nnssl, its axes are in order", "leave --fix_nnssl_axes away")
    return from_ours(content, name)


def adapted_name(base: str, name: str) -> str:
    """The plans name ``<base>_<name>``.

    Raises:
        NnsslError: a name that cannot be part of a folder name.
    """
    check_name(name, "--name")
    return f"{base}_{name}"


def check_name(name: str, flag: str) -> None:
    """Refuse what cannot be (part of) a plans name. nnU-Net splits folder names at ``__``, so that must not occur.

    Raises:
        NnsslError: such a name, for `flag`.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.-]*(_[A-Za-z0-9.-]+)*", name):
        raise NnsslError(
            f"'{name}' cannot be part of a plans name", f"use letters, digits, '-' and single '_' for {flag}"
        )


def adapt(
    source: Pretrained, plans: Mapping[str, Any], configuration: str, dataset_json: dict[str, Any], plans_name: str
) -> Adapted:
    """Build the target's network, fill it, and describe it in plans of its own.

    The new plans keep the data identifier of the given ones, so preprocessed data are shared, and hold this configuration alone:
    the checkpoint fits no other.

    Args:
        source: the checkpoint.
        plans: plans of the target data set.
        configuration: its configuration to fine-tune; 3D, no cascade.
        dataset_json: the target's, for channels and labels.
        plans_name: of the new plans.

    Raises:
        NnsslError: unsuitable configuration, or weights that do not fit.
    """
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    found = configuration_of(dict(plans), configuration)
    if len(found["patch_size"]) != 3 or "previous_stage" in found:
        raise NnsslError(
            f"configuration {configuration} of {plans['plans_name']} is 2D or the second stage of a cascade",
            "choose a 3D configuration with -c, e.g. 3d_fullres",
        )
    found.pop("next_stage", None)
    adapted: dict[str, Any] = {**plans, "plans_name": plans_name, "configurations": {configuration: found}}
    adapted[MARK] = {"file": source.origin, "kind": source.kind, "method": source.method}
    manager = PlansManager(adapted)
    channels = determine_num_input_channels(manager, manager.get_configuration(configuration), dataset_json)
    classes = manager.get_label_manager(dataset_json).num_segmentation_heads
    network = build_network(adapted, configuration, channels, classes)
    table = transfer(source, network, found["architecture"], plans["plans_name"])
    origin = {**adapted[MARK], "patch_size": source.patch_size, "input_channels": source.input_channels}
    content = assemble(
        network,
        adapted,
        configuration,
        method=source.method,
        citations=source.citations,
        not_pretrained=table.keys("new"),
        about={**source.about, "adapted_from": origin},
    )
    return Adapted(adapted, configuration, content, table, dataset_json, _notes(source, found))


def replaced(adapted: Adapted) -> str:
    """What `write_adapted` would replace, adapted under the same name before; "" for nothing."""
    plans_file = _plans_file(adapted.plans)
    before = read_json(plans_file).get(MARK) if plans_file.exists() else None
    if before is None:
        return ""
    about = f"{before['file']} ({before['method']})"
    return f"replaces {plans_file.name} and its checkpoint, adapted earlier from {about}; another --name keeps both"


def write_adapted(adapted: Adapted) -> Path:
    """Write checkpoint, transfer table and, last, the plans.

    Returns:
        The folder of checkpoint and table, below ``nnssl_results``.

    Raises:
        NnsslError: plans of that name exist and are not ours, or a folder cannot be written.
    """
    dataset, name = adapted.plans["dataset_name"], adapted.plans["plans_name"]
    plans_file = _plans_file(adapted.plans)
    if plans_file.exists() and MARK not in read_json(plans_file):
        raise NnsslError(f"{plans_file} exists and was not written by nnssl_adapt", "choose another --name")
    output = folder("nnssl_results") / dataset / f"adapted__{name}__{adapted.configuration}"
    save_checkpoint(output / CHECKPOINT, adapted.content)
    write_json(output / TABLE, {**adapted.plans[MARK], "plans": name, **adapted.table.as_json()})
    dataset_file = plans_file.parent / "dataset.json"
    if not dataset_file.exists():  # nnU-Net's planner, which copies it here, may never have run
        write_json(dataset_file, adapted.dataset_json)
    write_json(plans_file, adapted.plans)
    return output


def _plans_file(plans: dict[str, Any]) -> Path:
    return preprocessed_folder(plans["dataset_name"]) / f"{plans['plans_name']}.json"


def _notes(source: Pretrained, configuration: dict[str, Any]) -> tuple[str, ...]:
    """Where these plans feed the network with something else than pretraining did, or with mostly padding."""
    notes = []
    schemes = configuration["normalization_schemes"]
    if set(schemes) != set(source.normalization_schemes):
        notes.append(
            f"the plans normalise with {schemes}, the pretraining did with {list(source.normalization_schemes)}"
        )
    patch, median = configuration["patch_size"], configuration.get("median_image_size_in_voxels")
    if median and math.prod(patch) > 2 * math.prod(median):
        size, scan = ("x".join(str(round(v)) for v in edges) for edges in (patch, median))
        notes.append(f"the patch of {size} voxels is mostly padding around the median scan of {scan}; see --patch_size")
    return tuple(notes)
