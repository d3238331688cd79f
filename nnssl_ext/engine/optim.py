"""Optimiser groups, schedules in optimiser steps, and gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from nnssl_ext.contracts import OptimRule
from nnssl_ext.engine.settings import OptimSettings
from nnssl_ext.errors import NnsslError


@dataclass(frozen=True)
class Schedule:
    """Learning rate and weight decay of every optimiser step of a run.

    Attributes:
        optim: the settings.
        total: optimiser steps of the run.
        batch: cases per optimiser step, over all processes and micro-batches.
    """

    optim: OptimSettings
    total: int
    batch: int

    @property
    def peak(self) -> float:
        """The largest learning rate: ``lr`` scaled from ``lr_batch`` to this batch.

        Raises:
            NnsslError: scaling without a batch to scale from.
        """
        if self.optim.lr_scaling == "none":
            return self.optim.lr
        if not self.optim.lr_batch:
            raise NnsslError(
                f"--optim.lr_batch {self.optim.lr_batch} with --optim.lr_scaling {self.optim.lr_scaling}",
                "give the cases per optimiser step that --optim.lr is meant for",
            )
        exponent = {"sqrt": 0.5, "linear": 1.0}[self.optim.lr_scaling]
        return self.optim.lr * float((self.batch / self.optim.lr_batch) ** exponent)

    def learning_rate(self, step: int) -> float:
        """Learning rate of optimiser step ``step``, counted from 0.

        Linear from ``peak / warm-up steps`` to ``peak``, then polynomial with exponent 0.9 (nnU-Net), cosine or constant.
        """
        optim, peak = self.optim, self.peak
        warmup = round(optim.warmup * self.total if optim.warmup < 1 else optim.warmup)
        if step < warmup:
            return peak * (step + 1) / warmup
        done = (step - warmup) / max(1, self.total - warmup)
        if optim.schedule == "constant":
            return peak
        if optim.schedule == "poly":
            return peak * float((1 - done) ** 0.9)
        return optim.final_lr + (peak - optim.final_lr) * 0.5 * (1 + math.cos(math.pi * done))

    def weight_decay(self, step: int) -> float:
        """Weight decay of optimiser step ``step``: constant, or cosine from ``weight_decay`` to ``weight_decay_end``."""
        start, end = self.optim.weight_decay, self.optim.weight_decay_end
        if end is None:
            return start
        return end + (start - end) * 0.5 * (1 + math.cos(math.pi * step / self.total))

    def apply(self, optimizer: Optimizer, step: int) -> None:
        """Set the rates of every group of `build_optimizer` for this step."""
        scheduled, decay = self.learning_rate(step), self.weight_decay(step)
        for group in optimizer.param_groups:
            lr = self.peak if group["constant"] else scheduled
            group["lr"] = 0.0 if step < group["frozen_steps"] else lr * group["lr_scale"]
            group["weight_decay"] = decay if group["decayed"] else 0.0


def parameter_groups(module: nn.Module, rules: Sequence[OptimRule] = ()) -> list[dict[str, Any]]:
    """The trainable parameters, grouped by what `Schedule.apply` does with them.

    Matrices and kernels, tokens and positions are decayed; vectors and scalars (biases, norms, layer scales) are not.

    Raises:
        NnsslError: a rule that is for no parameter of the module.
    """
    named = list(module.named_parameters())
    for rule in rules:
        if not any(name.startswith(rule.prefix) for name, _ in named):
            raise NnsslError(
                f"{type(module).__name__} has an optimiser rule for '{rule.prefix}', but no parameter of that name",
                "correct the prefix in its optim_rules: they are for names as named_parameters() gives them",
            )
    groups: dict[tuple[float, bool, int, bool], dict[str, Any]] = {}
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        matching = [rule for rule in rules if name.startswith(rule.prefix)]
        scale = reduce(lambda product, rule: product * rule.lr_scale, matching, 1.0)
        constant = any(rule.constant for rule in matching)
        frozen = max((rule.frozen_steps for rule in matching), default=0)
        decayed = parameter.ndim > 1
        group = groups.setdefault(
            (scale, constant, frozen, decayed),
            {"params": [], "lr_scale": scale, "constant": constant, "frozen_steps": frozen, "decayed": decayed},
        )
        group["params"].append(parameter)
    return list(groups.values())


def build_optimizer(module: nn.Module, optim: OptimSettings, rules: Sequence[OptimRule] = ()) -> Optimizer:
    """The optimiser over every trainable parameter, fused where the device has a fused kernel.

    `Schedule.apply` sets its rates before every step.
    """
    groups = parameter_groups(module, rules)
    fused = next(module.parameters()).device.type in ("cuda", "cpu")
    if optim.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, fused=fused)
    nesterov = optim.optimizer == "nesterov"
    return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.betas[0], nesterov=nesterov, fused=fused)


def clip_gradients(module: nn.Module, optim: OptimSettings) -> Float[Tensor, ""]:
    """Scale gradients down to a norm of ``clip``: all together, those of each child module, or each on its own.

    A parameter that several children share belongs to the first of them. Nothing is read from the device.

    Returns:
        The norm of the whole gradient before clipping; not finite if any gradient is not.
    """
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            group = {"all": "", "module": name.split(".")[0], "parameter": name}[optim.clip_by]
            groups.setdefault(group, []).append(parameter)
    norms = [clip_grad_norm_(parameters, optim.clip) for parameters in groups.values()]
    return torch.linalg.vector_norm(torch.stack(norms))
