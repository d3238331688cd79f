"""Optimiser groups and the learning-rate schedule, in optimiser steps."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from nnssl_ext.engine.settings import OptimSettings


def learning_rate(step: int, total: int, optim: OptimSettings) -> float:
    """Learning rate of optimiser step ``step`` (counted from 0) of ``total``.

    Linear from ``lr / warm-up steps`` to ``lr``, then polynomial with exponent 0.9 (nnU-Net) or cosine.
    """
    warmup = round(optim.warmup * total)
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    if optim.schedule == "poly":
        return optim.lr * (1 - done) ** 0.9
    return optim.final_lr + (optim.lr - optim.final_lr) * 0.5 * (1 + math.cos(math.pi * done))


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices and kernels with weight decay, vectors and scalars (biases, norms, gains) without."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def build_optimizer(module: nn.Module, optim: OptimSettings) -> Optimizer:
    """The optimiser over every trainable parameter, fused where the device has a fused kernel."""
    groups = parameter_groups(module, optim.weight_decay)
    device = next(module.parameters()).device.type
    if optim.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.betas[0], nesterov=True, fused=device == "cuda")

    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, fused=device == "cuda")


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Give every group the same learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr
