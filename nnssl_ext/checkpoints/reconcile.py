"""Can weights of one architecture serve another? Decided from the two plans entries, before any tensor is touched."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nnssl_ext.checkpoints.adaptation_plan import token_size
from nnssl_ext.errors import NnsslError

SAME_PRIMUS = {
    "embed_dim": None,
    "eva_numheads": None,
    "num_register_tokens": 0,
    "class_token": False,
    "init_values": 0.1,
    "scale_attn_inner": True,
}
"""Arguments on which the encoder's function depends, and their defaults. Depth may differ."""

SAME_UNET = {
    "conv_op": None,
    "conv_bias": False,
    "norm_op": None,
    "norm_op_kwargs": None,
    "nonlin": None,
    "nonlin_kwargs": None,
    "nonlin_first": False,
    "block": None,
    "bottleneck_channels": None,
    "stem_channels": None,
}
PER_STAGE = ("features_per_stage", "n_blocks_per_stage", "n_conv_per_stage", "strides")
"""Must agree in the stages that both have. Kernels may grow: a rim of zeros changes nothing. The number of stages may differ."""

SAME_SWIN = {"feature_size": None, "depths": None, "num_heads": None, "window_size": None}

REMEDY = "plan the data set with the planner of the checkpoint; nnssl_adapt without -p plans it with the checkpoint's own architecture"


def reconcile(
    source: Mapping[str, Any], target: Mapping[str, Any], origin: str, plans_name: str, resize_tokens: bool = False
) -> None:
    """Compare the ``architecture`` entries of checkpoint and target plans.

    Args:
        resize_tokens: let tokens differ in size, which is not exact.

    Raises:
        NnsslError: the encoders differ in a way that no exact change of weights bridges; every difference is named.
    """
    ours, theirs = (a["network_class_name"].rsplit(".", 1)[-1] for a in (source, target))
    if ours != theirs:
        raise NnsslError(f"{origin} holds a {ours}, plans {plans_name} build a {theirs}", REMEDY)
    old, new = source["arch_kwargs"], target["arch_kwargs"]
    if ours == "SegmentationPrimus":
        differences = _primus_differences(old, new, resize_tokens)
    elif ours == "SegmentationSwinUNETR":
        differences = _unequal(SAME_SWIN, old, new)
    else:
        differences = _unet_differences(old, new)
    if differences:
        raise NnsslError(f"{origin} does not fit plans {plans_name}: " + "; ".join(differences), REMEDY)


def _primus_differences(source: Mapping[str, Any], target: Mapping[str, Any], resize_tokens: bool) -> list[str]:
    found = _unequal(SAME_PRIMUS, source, target)
    if token_size(source) != token_size(target) and not resize_tokens:
        found.append(f"tokens are {token_size(source)} voxels in the checkpoint, {token_size(target)} in the plans")
    return found


def _unet_differences(source: Mapping[str, Any], target: Mapping[str, Any]) -> list[str]:
    found = _unequal(SAME_UNET, source, target)
    common = min(source["n_stages"], target["n_stages"])
    for name in PER_STAGE:
        pairs = zip(_per_stage(source, name), _per_stage(target, name), strict=False)
        for stage, (old, new) in enumerate(list(pairs)[:common]):
            if old != new:
                found.append(f"stage {stage}: {name} is {old} in the checkpoint, {new} in the plans")
    kernels = zip(_per_stage(source, "kernel_sizes"), _per_stage(target, "kernel_sizes"), strict=False)
    for stage, (old, new) in enumerate(list(kernels)[:common]):
        if any(n < o or (n - o) % 2 for o, n in zip(old, new, strict=True)):
            found.append(f"stage {stage}: kernels of {old} cannot become {new} without losing weights")
    return found


def _unequal(defaults: Mapping[str, Any], source: Mapping[str, Any], target: Mapping[str, Any]) -> list[str]:
    pairs = {name: (source.get(name, default), target.get(name, default)) for name, default in defaults.items()}
    return [
        f"{name} is {old} in the checkpoint, {new} in the plans" for name, (old, new) in pairs.items() if old != new
    ]


def _per_stage(kwargs: Mapping[str, Any], name: str) -> list[Any]:
    """One value per stage; kernels and strides as lists per axis."""
    value = kwargs.get(name)
    if value is None:
        return []
    values = list(value) if isinstance(value, list | tuple) else [value] * kwargs["n_stages"]
    if name not in ("kernel_sizes", "strides"):
        return values
    return [list(v) if isinstance(v, list | tuple) else [v] * 3 for v in values]
