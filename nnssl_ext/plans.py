"""Reading plans: the file, and what pretraining needs to know from one of its configurations.

Our planners add a block ``configurations.<name>.nnssl`` to nnU-Net's plans::

    {"schema": 1, "backbone": "primus" | "resenc" | "swin", "preset": "PrimusM", "token_size": [8, 8, 8] | null,
     "global_crop": [z, y, x], "local_crop": [z, y, x], "batch_size": 2,
     "memory_gb": {"target": 8.0, "estimate": 7.1}, "reasons": {"<setting>": "<one sentence>"}}

Plans without the block (stock nnU-Net's) work too: crops and batch size then come from nnU-Net's own patch.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from nnssl_ext.contracts import HounsfieldScale, PretrainPlan
from nnssl_ext.errors import NnsslError, unknown_name
from nnssl_ext.files import read_json
from nnssl_ext.paths import dataset_id, dataset_name, folder

FINETUNING = "nnssl_finetuning"
"""The block ``plans[FINETUNING]`` with the settings of fine-tuning (`nnssl_ext.trainers.finetuning.settings`)."""


def preprocessed_folder(dataset: str | int) -> Path:
    """``nnUNet_preprocessed/DatasetXXX_Name`` of an id or a name."""
    return folder("nnUNet_preprocessed") / dataset_name(dataset)


def read_plans(dataset: str | int, plans_name: str) -> dict[str, Any]:
    """The plans of that name in the dataset's preprocessed folder.

    Raises:
        NnsslError: no such plans; the message lists those there are.
    """
    base = preprocessed_folder(dataset)
    path = base / f"{plans_name}.json"
    if not path.is_file():
        known = [p.stem for p in base.glob("*.json") if "Plans" in p.stem]
        error = unknown_name(f"plans (in {base})", plans_name, known)
        preset = re.fullmatch(r"nnssl(\w+)Plans", plans_name)
        if preset is None:  # the name of no planner's plans
            raise error
        raise NnsslError(
            error.what,
            f"{error.fix}; to create them: nnUNetv2_plan_and_preprocess -d {dataset_id(dataset)} -pl nnsslPlanner{preset[1]} "
            "-c 3d_fullres",
        )
    return dict(read_json(path))


def configuration_of(plans: dict[str, Any], configuration: str) -> dict[str, Any]:
    """One configuration, with nnU-Net's ``inherits_from`` resolved.

    Raises:
        NnsslError: the plans have no such configuration.
    """
    known = plans["configurations"]
    if configuration not in known:
        raise unknown_name(f"configuration of {plans['plans_name']}", configuration, known)
    found = dict(known[configuration])
    parent = found.pop("inherits_from", None)
    return {**configuration_of(plans, parent), **found} if parent else found


def pretrain_plan(plans: dict[str, Any], configuration: str, channels: int) -> PretrainPlan:
    """What a method may know about these plans.

    Raises:
        NnsslError: a 2D configuration, which pretraining does not cover.
    """
    found = configuration_of(plans, configuration)
    if len(found["patch_size"]) != 3:
        raise NnsslError(f"configuration {configuration} is 2D", "pretrain a 3D configuration, e.g. 3d_fullres")
    block = found.get("nnssl", {})
    network = found["architecture"]["network_class_name"].rsplit(".", 1)[-1]

    def size(name: str) -> tuple[int, int, int]:
        z, y, x = block.get(name) or found["patch_size"]
        return int(z), int(y), int(x)

    z, y, x = found["spacing"]
    return PretrainPlan(
        plans_name=plans["plans_name"],
        configuration=configuration,
        preset=block.get("preset", network),
        global_crop=size("global_crop"),
        local_crop=size("local_crop"),
        batch_size=int(block.get("batch_size", found["batch_size"])),
        spacing=(float(z), float(y), float(x)),
        channels=channels,
        hounsfield=tuple(_hounsfield(plans, found, channel) for channel in range(channels)),
        token_size=size("token_size") if block.get("token_size") else None,
    )


def _hounsfield(plans: dict[str, Any], configuration: dict[str, Any], channel: int) -> HounsfieldScale | None:
    schemes = configuration.get("normalization_schemes", ())
    properties = plans.get("foreground_intensity_properties_per_channel", {}).get(str(channel))
    if channel >= len(schemes) or schemes[channel] != "CTNormalization" or not properties:
        return None
    return HounsfieldScale(
        mean=float(properties["mean"]),
        std=float(properties["std"]),
        lower=float(properties["percentile_00_5"]),
        upper=float(properties["percentile_99_5"]),
    )
