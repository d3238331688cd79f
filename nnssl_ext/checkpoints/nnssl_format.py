"""Checkpoints of nnssl and OpenMind, read without nnssl.

What is known of their format and its defects was measured on nnssl 70448644:

- SparK separates the two names of each convolution and trains only one: ``all_modules.0`` is what the network executes, ``conv`` keeps
  its initial values. They also lack the adaptation plan.
- The Primus MAE flattens tokens in the order (y, z, x) while its rotary table and every fine-tuning network use (z, y, x):
  positions are learned with the first two axes swapped. Whether the published weights have this defect is unknown, so it is
  mended on request only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from nnssl_ext.checkpoints.adaptation_plan import token_grid
from nnssl_ext.checkpoints.pretrained import Pretrained
from nnssl_ext.errors import NnsslError, unknown_name
from nnssl_ext.networks.presets import PRIMUS_PRESETS

UNETS = ("ResidualEncoderUNet", "PlainConvUNet")
UNET_PATH = "dynamic_network_architectures.architectures.unet."
PRIMUS_PATH = "nnssl_ext.networks.primus.SegmentationPrimus"

RESENC_L: dict[str, Any] = {
    "n_stages": 6,
    "features_per_stage": [32, 64, 128, 256, 320, 320],
    "conv_op": "torch.nn.modules.conv.Conv3d",
    "kernel_sizes": [[3, 3, 3]] * 6,
    "strides": [[1, 1, 1]] + [[2, 2, 2]] * 5,
    "n_blocks_per_stage": [1, 3, 4, 6, 6, 6],
    "n_conv_per_stage_decoder": [1] * 5,
    "conv_bias": True,
    "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
    "norm_op_kwargs": {"eps": 1e-5, "affine": True},
    "dropout_op": None,
    "dropout_op_kwargs": None,
    "nonlin": "torch.nn.LeakyReLU",
    "nonlin_kwargs": {"inplace": True},
}
"""The network that nnssl calls ResEncL (its architecture registry; 102.3 M parameters)."""

PATCH = (160, 160, 160)
"""nnssl's trainers fix this patch where a file does not say otherwise."""

_SPARK_PLAN: dict[str, Any] = {
    "architecture_plans": {"arch_class_name": "ResEncL"},
    "key_to_encoder": "encoder.stages",
    "key_to_stem": "encoder.stem",
}


def from_nnssl(content: dict[str, Any], origin: str, fix_axes: bool = False) -> Pretrained:
    """A checkpoint of nnssl in the words of our networks.

    Args:
        content: the loaded file.
        origin: what to call it in messages.
        fix_axes: undo the axis defect of nnssl's Primus MAE (see the module's docstring).

    Raises:
        NnsslError: an architecture we do not know, missing encoder weights, or an axis fix that does not apply.
    """
    notes = []
    plan = content.get("nnssl_adaptation_plan")
    if plan is None:
        plan = _SPARK_PLAN
        notes.append("the file has no adaptation plan, as nnssl's SparK trainers leave it: taken for a ResEncL")
    configurations: dict[str, Any] = plan.get("pretrain_plan", {}).get("configurations", {})
    configuration: dict[str, Any] = next(iter(configurations.values()), {})
    patch = plan.get("pretrain_patch_size") or configuration.get("patch_size") or PATCH
    patch = tuple(int(p) for p in patch)
    spacing = configuration.get("spacing") or (1, 1, 1)
    architecture = _architecture(plan["architecture_plans"], patch, origin)
    primus = architecture["network_class_name"] == PRIMUS_PATH

    weights, stale = executed_names(content["network_weights"])
    if stale:
        notes.append(f"{stale} convolutions had stale values under '.conv'; those under '.all_modules.0' were taken")
    weights = _rename(weights, plan, primus, origin)
    if fix_axes:
        weights = swap_first_axes(weights, architecture["arch_kwargs"], origin)
        notes.append("the first two axes of positions, queries and keys were swapped on request (nnssl's Primus MAE)")
    return Pretrained(
        origin=origin,
        kind="nnssl",
        method=str(content.get("trainer_name", "nnssl")),
        weights=weights,
        not_pretrained=frozenset(),
        architecture=architecture,
        preset=plan["architecture_plans"]["arch_class_name"].rsplit(".", 1)[-1],
        input_channels=int(plan.get("pretrain_num_input_channels", 1)),
        patch_size=tuple(int(p) for p in plan.get("recommended_downstream_patchsize") or patch),
        spacing=tuple(float(s) for s in spacing) if configuration.get("spacing_style") == "onemmiso" else None,
        normalization_schemes=tuple(configuration.get("normalization_schemes") or ["ZScoreNormalization"]),
        batch_size=2,  # what nnssl's fine-tuning commands impose
        citations=list(content.get("citations") or []),
        about={"settings": {}, "data": {}, "progress": {"epoch": int(content.get("current_epoch", 0))}},
        notes=tuple(notes),
    )


def executed_names(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """Give each ``.conv.`` the values of its twin ``.all_modules.0.``, which is what the network executes.

    Returns:
        The weights, and how many convolution kernels had differed.
    """
    found, stale = dict(weights), 0
    for key, value in weights.items():
        twin = key.replace(".all_modules.0.", ".conv.")
        if twin != key and twin in found:
            stale += key.endswith(".weight") and not torch.equal(found[twin], value)
            found[twin] = value
    return found, stale


def swap_first_axes(weights: Mapping[str, Tensor], kwargs: Mapping[str, Any], origin: str) -> dict[str, Tensor]:
    """Undo nnssl's token order in a Primus: the same features, from tokens in C order.

    A token at (z, y, x) had the learned position and the rotation of (y, z, x). So the position table is transposed, and in every
    head the rows of queries and keys that axis 0 rotates change places with those of axis 1 (timm lays the three axes out one
    after the other, each over a third of the head).

    Raises:
        NnsslError: no Primus, or a patch whose first two axes differ, for which nnssl's order is no swap.
    """
    if "eva.pos_embed" not in weights:
        raise NnsslError(f"{origin} has no token positions whose axes could be fixed", "leave --fix_nnssl_axes away")
    shape, heads = kwargs["input_shape"], kwargs["eva_numheads"]
    if shape[0] != shape[1]:
        raise NnsslError(
            f"{origin}: axes can be fixed only where the first two edges of the patch are equal, here {tuple(shape)}",
            "leave --fix_nnssl_axes away",
        )
    fixed = dict(weights)
    z, y, _ = token_grid(kwargs)
    fixed["eva.pos_embed"] = rearrange(weights["eva.pos_embed"], "b (z y x) e -> b (y z x) e", z=z, y=y)
    for key, value in weights.items():
        if key.endswith((".attn.q_proj.weight", ".attn.k_proj.weight", ".attn.q_proj.bias", ".attn.k_proj.bias")):
            axes = rearrange(value, "(h a d) ... -> a h d ...", h=heads, a=3)
            fixed[key] = rearrange(axes[[1, 0, 2]], "a h d ... -> (h a d) ...")
    return fixed


def _architecture(plans: Mapping[str, Any], patch: tuple[int, ...], origin: str) -> dict[str, Any]:
    """nnssl's architecture as a plans file of ours writes it."""
    name, kwargs = plans["arch_class_name"].rsplit(".", 1)[-1], plans.get("arch_kwargs")
    if name == "ResEncL" or (name in UNETS and kwargs):
        imports = plans.get("arch_kwargs_requiring_import") or ["conv_op", "norm_op", "dropout_op", "nonlin"]
        return {
            "network_class_name": UNET_PATH + ("ResidualEncoderUNet" if name == "ResEncL" else name),
            "arch_kwargs": dict(RESENC_L if name == "ResEncL" else kwargs or {}),
            "_kw_requires_import": list(imports),
        }
    preset = PRIMUS_PRESETS.get(name)
    if preset is not None:
        kwargs = {
            "embed_dim": preset.embed_dim,
            "encoder_eva_depth": preset.depth,
            "encoder_eva_numheads": preset.num_heads,
            "patch_embed_size": [8, 8, 8],
            "init_values": preset.init_values,
            "scale_attn_inner": preset.scale_attn_inner,
        }
    elif name != "Primus" or not kwargs:
        raise unknown_name(f"architecture in {origin}:", name, ["ResEncL", "Primus", *UNETS, *PRIMUS_PRESETS])
    return {
        "network_class_name": PRIMUS_PATH,
        "arch_kwargs": {
            "embed_dim": kwargs["embed_dim"],
            "eva_depth": kwargs["encoder_eva_depth"],
            "eva_numheads": kwargs["encoder_eva_numheads"],
            "input_shape": list(patch),
            "strides": _strides(kwargs["patch_embed_size"], origin),
            "init_values": kwargs["init_values"],
            "scale_attn_inner": kwargs["scale_attn_inner"],
        },
        "_kw_requires_import": [],
    }


def _strides(token: list[int], origin: str) -> list[list[int]]:
    """Steps of at most 2 per axis from voxels to tokens, the last ones along the longest axes."""
    if any(t & (t - 1) or t < 1 for t in token) or max(token) < 2:
        raise NnsslError(
            f"{origin} has tokens of {token} voxels", "only powers of two can be decoded; use another checkpoint"
        )
    steps = max(token).bit_length() - 1
    return [[1, 1, 1]] + [[2 if t >= 2 ** (steps - s) else 1 for t in token] for s in range(steps)]


def _rename(weights: dict[str, Tensor], plan: Mapping[str, Any], primus: bool, origin: str) -> dict[str, Tensor]:
    """Encoder and stem under the names of our networks, everything else under its own."""
    ours = {"key_to_encoder": "eva", "key_to_stem": "down_projection"} if primus else {}
    found = dict(weights)
    for field in ("key_to_encoder", "key_to_stem"):
        theirs = plan[field]
        part = [key for key in weights if key.startswith(f"{theirs}.")]
        if not part:
            tops = sorted({".".join(key.split(".")[:2]) for key in weights})
            raise NnsslError(
                f"{origin}: no weight starts with '{theirs}', which its adaptation plan gives as {field}",
                f"correct the plan in the file; the weights start with {', '.join(tops[:12])}",
            )
        for key in part:
            found[ours.get(field, theirs) + key[len(theirs) :]] = found.pop(key)
    return found
