"""The method of a run at its first step: initialised by the seed, or with the weights of another run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nnssl_ext.catalogue import load_method
from nnssl_ext.checkpoints.adapt import read_pretrained
from nnssl_ext.checkpoints.aliases import alias_groups
from nnssl_ext.checkpoints.pretrained import Pretrained
from nnssl_ext.checkpoints.transfer import Action, Row, TransferTable, transfer
from nnssl_ext.contracts import Backbone, ViewPolicy
from nnssl_ext.engine.job import Job
from nnssl_ext.networks.build import build_backbone
from nnssl_ext.networks.segmentation_layer import segmentation_layer, trained_layer
from nnssl_ext.plans import configuration_of
from nnssl_ext.records import Case

TEACHER = "teacher.parts."
"""What stands before the names of a student's parameters in the state of a method with an `EMATeacher`."""


@dataclass(frozen=True)
class Beginning:
    """A method before its first step, and where its weights come from.

    Attributes:
        method: the method.
        table: what became of every tensor of the other run, None without one.
        origin: file, kind, method, patch_size and input_channels of the other run's checkpoint, for our checkpoints.
    """

    method: Any
    table: TransferTable | None = None
    origin: dict[str, Any] = field(default_factory=dict)


def build_method(job: Job) -> Any:
    """The method of a job with its backbone, initialised by the job's seed.

    Parts of the network that the method does not train are frozen: data-parallel training waits for a gradient of every
    parameter that may have one.

    Raises:
        NnsslError: a case from which the method's views cannot be drawn.
    """
    return _around(_backbone(job), job)


def begin(job: Job) -> Beginning:
    """The method of a job, with the weights of the checkpoint that its run names, if any.

    The backbone takes the weights that the other run exported, so where that was a teacher the student starts as the
    teacher (3DINO's high-resolution phase), and the new teacher as their copy. Positions are interpolated to another
    crop, a patch embedding is resized to another token. A ``checkpoint_latest.pth`` of the same method also gives its heads,
    predictors, mask token and centres. A method that trains the segmentation layer takes it over where it tells as many
    labels. Nothing else is continued: the optimiser and all schedules begin anew.

    Raises:
        NnsslError: the checkpoint cannot be read, or does not fit the plans; or a case from which the method's views cannot
            be drawn.
    """
    if job.run.pretrained_weights is None:
        return Beginning(build_method(job))
    source = read_pretrained(job.run.pretrained_weights, segmentation_models=True)
    backbone = _backbone(job)
    plan = job.plan
    architecture = configuration_of(job.plans, plan.configuration)["architecture"]
    table = transfer(source, backbone.network, architecture, plan.plans_name, resize_tokens=True)
    method = _around(backbone, job)
    taken = _take_segmentation_layer(source, backbone.network, method.pretrained_prefixes)
    state = source.method_state if source.method == job.method else {}
    rows = _fill(method, state, (backbone.network, method.export_backbone().network))
    origin = {
        "file": source.origin,
        "kind": source.kind,
        "method": source.method,
        "patch_size": list(source.patch_size),
        "input_channels": source.input_channels,
    }
    return Beginning(method, TransferTable((*(taken.get(row.key, row) for row in table.rows), *rows)), origin)


def _backbone(job: Job) -> Backbone:
    torch.manual_seed(job.run.seed)
    return build_backbone(job.plans, job.plan.configuration, job.plan.channels)


def _around(backbone: Backbone, job: Job) -> Any:
    method = load_method(job.method)(job.settings, backbone, job.plan)
    for name, parameter in backbone.network.named_parameters():
        parameter.requires_grad_(name.startswith(method.pretrained_prefixes))
    _try_draws(method.view_policy, job.cases)
    return method


def _try_draws(policy: ViewPolicy, cases: Sequence[Case]) -> None:
    """Draw once from a case of every shape: what a policy refuses is then named before training, not in its first epoch."""
    for case in {(case.shape, case.spacing): case for case in cases}.values():
        policy.draw(case, np.random.default_rng(0), 0.5)


@torch.no_grad()
def _take_segmentation_layer(source: Pretrained, network: nn.Module, trained: tuple[str, ...]) -> dict[str, Row]:
    """Copy the layer if the method trains it, the checkpoint did, and both tell as many labels.

    Returns:
        What became of its tensors, by name; nothing where the method leaves the layer alone.
    """
    prefix, layer = segmentation_layer(network)
    if prefix not in trained:
        return {}
    found = trained_layer(source.weights, source.not_pretrained)
    own = {prefix + name: value for name, value in layer.state_dict().items()}
    fits = all(name in found and found[name].shape == value.shape for name, value in own.items())
    action: Action = "loaded" if fits else "new"
    why = "" if fits else f"the checkpoint tells no {layer.out_channels} labels"
    rows = {}
    for name, value in own.items():
        shape = tuple(found[name].shape) if name in found else None
        rows[name] = Row(name, action, why, shape, tuple(value.shape))
        if fits:
            value.copy_(found[name])
    return rows


@torch.no_grad()
def _fill(method: nn.Module, state: dict[str, Tensor], networks: tuple[nn.Module, ...]) -> list[Row]:
    """Copy what a method holds beside its networks, where names and shapes agree; a student's from the teacher."""
    inside = tuple(f"{name}." for name, m in method.named_modules(remove_duplicate=False) if m in networks)
    own = method.state_dict()
    rows = []
    action: Action
    for key, *aliases in alias_groups(own):
        if key.startswith(inside):
            continue
        value = state.get(TEACHER + key, state.get(key))
        target, shape = own[key], None if value is None else tuple(value.shape)
        if value is None:
            action, why = "new", "not in the checkpoint"
        elif shape != tuple(target.shape):
            action, why = "new", "another shape in the checkpoint"
        else:
            action, why = "loaded", ""
            target.copy_(value)
        rows.append(Row(key, action, why, shape, tuple(target.shape), tuple(aliases)))
    return rows
