"""Small self-distillation methods (DINO3DTrainer, IBOTTrainer), batches for them, and training steps as the engine makes them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from lightning_fabric import Fabric
from tiny_dataset import BACKBONES, plans_of

from nnssl_ext.data.loader import RegionBatch
from nnssl_ext.engine.job import Job
from nnssl_ext.engine.optim import Schedule, build_optimizer
from nnssl_ext.engine.settings import RunSettings
from nnssl_ext.engine.step import Parts, StepGraph
from nnssl_ext.networks.build import build_backbone
from nnssl_ext.networks.dino_head import HeadSettings
from nnssl_ext.plans import pretrain_plan
from nnssl_ext.records import Case
from nnssl_ext.trainers.pretraining.dino3d import DINO3DTrainer
from nnssl_ext.trainers.pretraining.ibot import IBOTTrainer
from nnssl_ext.views.cut import cut_views

HEAD = HeadSettings(prototypes=64, hidden=32, bottleneck=16)
EVERY_PAIR = [(kind, backbone) for kind in (DINO3DTrainer, IBOTTrainer) for backbone in BACKBONES]


def method_of(kind=DINO3DTrainer, backbone="PrimusTiny", network=(), **changes):
    torch.manual_seed(0)
    plans = plans_of(backbone)
    plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"] |= dict(network)
    plan = pretrain_plan(plans, "3d_fullres", 1)
    settings = replace(kind.settings_type.for_plan(plan), head=HEAD, **changes)
    method = kind(settings, build_backbone(plans, "3d_fullres", 1), plan)
    for name, parameter in method.backbone.network.named_parameters():  # as the engine does
        parameter.requires_grad_(name.startswith(method.pretrained_prefixes))
    return method


def batch_of(method, tmp_path, batch: int = 2, seed: int = 0) -> RegionBatch:
    rng = np.random.default_rng(seed)
    case = Case("case", tmp_path, 1, (20, 20, 20), (1.0, 1.0, 1.0))
    quantiles = (rng.permutation(batch) + rng.random(batch)) / batch
    return RegionBatch(
        voxels=torch.randn(batch, 1, 20, 20, 20, generator=torch.Generator().manual_seed(seed)),
        lower=torch.zeros(batch, 3, dtype=torch.int64),
        case_shape=torch.full((batch, 3), 20),
        spacing=torch.ones(batch, 3),
        cases=tuple(f"case_{row}" for row in range(batch)),
        draws=tuple(method.view_policy.draw(case, rng, float(quantile)) for quantile in quantiles),
    )


def views_of(method, tmp_path, batch: int = 2, seed: int = 0):
    return cut_views(batch_of(method, tmp_path, batch, seed), torch.device("cpu"))


def parts_of(method, steps: int = 10) -> Parts:
    """A training step of `method`, as the engine assembles it, in a run of so many steps."""
    fabric = Fabric(accelerator="cpu", devices=1)
    settings = replace(method.settings, epochs=1, iterations=steps)
    plan = pretrain_plan(plans_of("PrimusTiny"), "3d_fullres", 1)
    job = Job(type(method).__name__, settings, RunSettings(batch_size=2), "", {}, plan, (), Path())
    optimizer = build_optimizer(method, settings.optim, method.optim_rules)
    graph, optimizer = fabric.setup(StepGraph(method, autocast=False), optimizer)
    return Parts(fabric, job, method, graph, optimizer, Schedule(settings.optim, steps, batch=2))


def record_calls(monkeypatch, module, name: str) -> list:
    calls, real = [], getattr(module, name)

    def recorded(*arguments):
        calls.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(module, name, recorded)
    return calls
