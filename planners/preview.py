"""Plans in words: sizes in voxels and mm, parameters, memory, and why."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from nnssl_ext.planners.memory import Cost, network_cost
from nnssl_ext.plans import configuration_of


def describe(plans: dict[str, Any], configuration: str, classes: int) -> str:
    """Plans of ours as a short table; one line per decision, with its reason."""
    found = configuration_of(plans, configuration)
    block = found["nnssl"]
    spacing, reasons = found["spacing"], block["reasons"]
    cost = cost_of(plans, configuration, classes)

    def size(voxels: Sequence[int]) -> str:
        return f"{_by(voxels)} voxels = {_by([v * s for v, s in zip(voxels, spacing, strict=True)])} mm"

    def tokens(voxels: Sequence[int]) -> str:
        token = block["token_size"]
        if not token:
            return ""
        grid = [v // t for v, t in zip(voxels, token, strict=True)]
        return f", {_by(grid)} = {math.prod(grid)} tokens"

    rows = [("spacing", f"{_by(spacing)} mm", reasons["spacing"])]
    if block["token_size"]:
        rows.append(("token", size(block["token_size"]), reasons["token_size"]))
    for name in ("global_crop", "local_crop"):
        rows.append((name.replace("_", " "), size(block[name]) + tokens(block[name]), reasons[name]))
    memory = block["memory_gb"]
    rows += [
        ("batch", f"{block['batch_size']} cases to pretrain, {found['batch_size']} in nnU-Net", reasons["batch_size"]),
        (
            "memory",
            f"{memory['estimate']:.1f} GB of {memory['target']:g} GB",
            _too_much(memory) + "estimate in bf16; see planners/memory.py",
        ),
        (
            "parameters",
            f"{cost.parameters / 1e6:.1f} million",
            f"{cost.macs * 2e-9:.1f} GFLOP per case and forward pass",
        ),
    ]
    whys = [why for name, why in reasons.items() if name.startswith("normalization")]
    for channel, (scheme, why) in enumerate(zip(found["normalization_schemes"], whys, strict=True)):
        rows.append((f"channel {channel}", scheme, why))
    head = f"{plans['plans_name']}, {configuration}, {plans['dataset_name']} (axes z, y, x)"
    return "\n".join([head, *(f"  {name:<12} {value}\n  {'':<12}   {why}" for name, value, why in rows)])


def _too_much(memory: dict[str, float]) -> str:
    if memory["estimate"] <= memory["target"]:
        return ""
    return (
        f"needs {memory['estimate']:g} GB, the target is {memory['target']:g} GB: take a smaller planner or sizes, or raise "
        "-gpu_memory_target; "
    )


def cost_of(plans: dict[str, Any], configuration: str, classes: int, crop: str = "global_crop") -> Cost:
    """Of the planned network on one global or local crop."""
    found = configuration_of(plans, configuration)
    return network_cost(found["architecture"], found["nnssl"][crop], len(found["normalization_schemes"]), classes)


def _by(values: Sequence[int | float]) -> str:
    return "x".join(f"{value:.4g}" for value in values)
