"""The ``nnssl_adaptation_plan``: what nnssl's readers in nnU-Net (the ``like_nnssl`` commands) ask a checkpoint.

Two readers exist. ``nnUNetv2_preprocess_like_nnssl`` loads stem and encoder with ``strict=True``; ``nnUNetv2_plan_like_dynamic``
takes what fits. Both read the keys written here; ``architecture_kwargs`` is read by the second alone.

They build Primus by name only for 8-voxel tokens in the sizes S, B, M and L. Any other Primus (our PrimusTiny, 4-voxel tokens)
is written as ``Primus`` with the arguments that nnU-Net's ``PretrainedTrainer_Primusx`` reads, and only that trainer builds it.
Class and register tokens are beyond both readers: they would drop them. Such checkpoints go through `nnssl_adapt`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from nnssl_ext.networks.presets import PRIMUS_PRESETS
from nnssl_ext.plans import configuration_of
from nnssl_ext.records import Size

NAMED_PRIMUS = ("PrimusS", "PrimusB", "PrimusM", "PrimusL")
"""Sizes that nnU-Net's ``get_network_from_name`` knows."""

PLAN_FIELDS = (
    "dataset_name",
    "plans_name",
    "original_median_spacing_after_transp",
    "image_reader_writer",
    "transpose_forward",
    "transpose_backward",
    "experiment_planner_used",
)
CONFIGURATION_FIELDS = (
    "data_identifier",
    "preprocessor_name",
    "spacing",
    "normalization_schemes",
    "use_mask_for_norm",
    "resampling_fn_data",
    "resampling_fn_data_kwargs",
    "patch_size",
    "batch_size",
)


def adaptation_plan(network: Any, plans: dict[str, Any], configuration: str, input_channels: int) -> dict[str, Any]:
    """The plan for a network built from one configuration of `plans`; JSON types only.

    The network, any of nnU-Net's library, names its parts itself (``key_to_encoder`` and the like).
    """
    found = configuration_of(plans, configuration)
    kwargs = found["architecture"]["arch_kwargs"]
    plan: dict[str, Any] = {
        "architecture_plans": architecture_plans(found["architecture"]),
        "pretrain_plan": {
            **{field: plans.get(field) for field in PLAN_FIELDS},
            "configurations": {
                configuration: {
                    **{field: found[field] for field in CONFIGURATION_FIELDS if field in found},
                    "spacing_style": "median",
                    "patch_size": kwargs.get("input_shape", found["patch_size"]),  # the size behind the position table
                }
            },
        },
        "pretrain_num_input_channels": input_channels,
        "recommended_downstream_patchsize": found["patch_size"],
        "key_to_encoder": network.key_to_encoder,
        "key_to_stem": network.key_to_stem,
        "keys_to_in_proj": network.keys_to_in_proj,
        "key_to_lpe": getattr(network, "key_to_lpe", None),
    }
    if "kernel_sizes" in kwargs:
        plan["architecture_kwargs"] = {"n_stages": kwargs["n_stages"], "kernel_sizes": kwargs["kernel_sizes"]}
    return dict(json.loads(json.dumps(plan)))


def architecture_plans(architecture: dict[str, Any]) -> dict[str, Any]:
    """A plans file's ``architecture`` entry in nnssl's words."""
    kwargs = architecture["arch_kwargs"]
    if architecture["network_class_name"].rsplit(".", 1)[-1] != "SegmentationPrimus":
        return {
            "arch_class_name": architecture["network_class_name"],
            "arch_kwargs": kwargs,
            "arch_kwargs_requiring_import": architecture["_kw_requires_import"],
        }
    size = (kwargs["embed_dim"], kwargs["eva_depth"], kwargs["eva_numheads"], *token_size(kwargs))
    init_values, scale_attn_inner = kwargs.get("init_values", 0.1), kwargs.get("scale_attn_inner", True)
    for name in NAMED_PRIMUS:
        preset = PRIMUS_PRESETS[name]
        if (init_values, scale_attn_inner) == (0.1, True) and size == (
            preset.embed_dim,
            preset.depth,
            preset.num_heads,
            8,
            8,
            8,
        ):
            return {"arch_class_name": name, "arch_kwargs": None, "arch_kwargs_requiring_import": None}
    return {
        "arch_class_name": "Primus",
        "arch_kwargs": {
            "embed_dim": kwargs["embed_dim"],
            "patch_embed_size": list(token_size(kwargs)),
            "encoder_eva_depth": kwargs["eva_depth"],
            "encoder_eva_numheads": kwargs["eva_numheads"],
            "scale_attn_inner": scale_attn_inner,
            "init_values": init_values,
        },
        "arch_kwargs_requiring_import": [],
    }


def token_size(kwargs: Mapping[str, Any]) -> Size:
    """Voxels per coarsest feature along z, y, x: the product of an architecture's ``strides``, for a Primus its token."""
    per_stage = [(s, s, s) if isinstance(s, int) else s for s in kwargs["strides"]]
    z, y, x = (math.prod(axis) for axis in zip(*per_stage, strict=True))
    return z, y, x


def token_grid(kwargs: Mapping[str, Any]) -> Size:
    """Tokens along z, y, x of the position table of a `SegmentationPrimus` with these arguments."""
    z, y, x = (size // token for size, token in zip(kwargs["input_shape"], token_size(kwargs), strict=True))
    return z, y, x
