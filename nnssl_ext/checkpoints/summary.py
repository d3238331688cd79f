"""What is in a checkpoint file, in JSON types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nnssl_ext.checkpoints.aliases import alias_groups
from nnssl_ext.checkpoints.schema import kind_of
from nnssl_ext.plans import configuration_of

WRITERS = {"nnssl_ext": "nnssl-ext", "nnssl": "nnssl (OpenMind)", "nnunet": "nnU-Net"}


def summarise(content: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """The gist of a loaded checkpoint of ours, of nnssl or of nnU-Net.

    Returns:
        file, written_by, method, architecture, input_channels, patch_size, spacing, parameters, tensors, names, modules
        (per module: names, tensors, parameters), trained (per module: trained and other parameters; ours only), progress, data,
        settings, plan (how nnssl's readers take it apart), citations, resumable, adapted_from. None where the file does not say.

    Raises:
        NnsslError: no checkpoint of these.
    """
    kind = kind_of(content, origin)
    weights: dict[str, Tensor] = content["network_weights"]
    described = {"nnssl_ext": _ours, "nnssl": _nnssl, "nnunet": _nnunet}[kind](content)
    untrained = set(described.pop("not_pretrained", []))
    groups = alias_groups(weights)
    return {
        "file": origin,
        "written_by": WRITERS[kind],
        **described,
        "parameters": sum(weights[names[0]].numel() for names in groups),
        "tensors": len(groups),
        "names": len(weights),
        "modules": _modules(weights, groups, untrained),
        "plan": _readers(content.get("nnssl_adaptation_plan")),
        "citations": content.get("citations") or [],
    }


def _ours(content: Mapping[str, Any]) -> dict[str, Any]:
    ours = content["nnssl_ext"]
    found = configuration_of(ours["plans"], ours["configuration"])
    return {
        "package_version": ours["version"],
        "method": ours["method"],
        "plans": ours["plans"]["plans_name"],
        "configuration": ours["configuration"],
        "architecture": found["architecture"],
        "input_channels": ours["input_channels"],
        "patch_size": found["patch_size"],
        "spacing": found["spacing"],
        "progress": ours["progress"],
        "data": ours["data"],
        "settings": ours["settings"],
        "adapted_from": ours.get("adapted_from"),
        "resumable": "resume" in content,
        "not_pretrained": ours["not_pretrained"],
    }


def _nnssl(content: Mapping[str, Any]) -> dict[str, Any]:
    plan = content.get("nnssl_adaptation_plan") or {}
    pretraining: dict[str, Any] = plan.get("pretrain_plan") or {}
    configurations: dict[str, Any] = pretraining.get("configurations") or {}
    name = next(iter(configurations), None)
    found: dict[str, Any] = configurations.get(name or "", {})
    return {
        "method": content.get("trainer_name"),
        "plans": pretraining.get("plans_name"),
        "configuration": name,
        "architecture": plan.get("architecture_plans"),
        "input_channels": plan.get("pretrain_num_input_channels"),
        "patch_size": plan.get("pretrain_patch_size") or found.get("patch_size"),
        "spacing": found.get("spacing"),
        "progress": {"epoch": content.get("current_epoch")},
        "resumable": "optimizer_state" in content,
    }


def _nnunet(content: Mapping[str, Any]) -> dict[str, Any]:
    init = content["init_args"]
    found = configuration_of(init["plans"], init["configuration"])
    return {
        "method": content.get("trainer_name"),
        "plans": init["plans"]["plans_name"],
        "configuration": init["configuration"],
        "architecture": found.get("architecture"),
        "input_channels": len(found["normalization_schemes"]),
        "patch_size": found["patch_size"],
        "spacing": found["spacing"],
        "progress": {"epoch": content.get("current_epoch")},
        "data": {"dataset": init["plans"]["dataset_name"], "labels": init["dataset_json"].get("labels")},
        "resumable": "optimizer_state" in content,
    }


def _modules(
    weights: Mapping[str, Tensor], groups: list[tuple[str, ...]], untrained: set[str]
) -> dict[str, dict[str, int]]:
    """Per first two levels of names: all names, and of the tensors that start there their number and parameters."""
    found: dict[str, dict[str, int]] = {}

    def of(key: str) -> dict[str, int]:
        module = ".".join(key.split(".")[:-1][:2]) or key
        return found.setdefault(module, {"names": 0, "tensors": 0, "parameters": 0, "not_pretrained": 0})

    for key in weights:
        of(key)["names"] += 1
    for names in groups:
        module, size = of(names[0]), weights[names[0]].numel()
        module["tensors"] += 1
        module["parameters"] += size
        module["not_pretrained"] += size * (names[0] in untrained)
    return found


def _readers(plan: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The part of nnssl's adaptation plan that says where encoder, stem and positions are."""
    if plan is None:
        return None
    shown = ("key_to_encoder", "key_to_stem", "keys_to_in_proj", "key_to_lpe", "recommended_downstream_patchsize")
    return {key: plan.get(key) for key in shown}
