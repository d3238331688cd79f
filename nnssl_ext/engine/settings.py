"""Settings of a run that every method shares; the values travel as JSON with the run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from nnssl_ext.errors import NnsslError


@dataclass(frozen=True)
class OptimSettings:
    """Optimiser and schedule.

    Attributes:
        optimizer: ``adamw``, ``sgd`` with momentum, or ``nesterov``, which is nnU-Net's SGD.
        lr: peak learning rate.
        lr_scaling: how the peak follows the batch: ``none``, or ``lr`` times the square root (DINOv2) or the first power
            (SimSiam) of cases per optimiser step / ``lr_batch``.
        lr_batch: cases per optimiser step, over all processes, that ``lr`` is meant for; None where the method's other settings
            decide it.
        weight_decay: on matrices and kernels only; biases, norms and other vectors are not decayed.
        weight_decay_end: weight decay at the end of the run, reached by a cosine; None = constant.
        betas: AdamW's; ``betas[0]`` is the momentum of the others.
        schedule: ``poly`` = nnU-Net's (1 - t) ** 0.9, ``cosine`` to ``final_lr``, or ``constant``, after a linear warm-up from 0.
        warmup: share of all optimiser steps, or their number from 1 on.
        final_lr: learning rate at the end of ``cosine``, whatever the scaling.
        clip: largest gradient norm; inf: no clipping.
        clip_by: what is clipped on its own: ``all`` gradients together, each child ``module`` of the method (DINOv2: backbone
            and heads), or each ``parameter`` (DINO, iBOT).
        accumulate: micro-batches per optimiser step.
    """

    optimizer: Literal["adamw", "sgd", "nesterov"] = "adamw"
    lr: float = 3e-4
    lr_scaling: Literal["none", "sqrt", "linear"] = "none"
    lr_batch: int | None = 1024
    weight_decay: float = 5e-2
    weight_decay_end: float | None = None
    betas: tuple[float, float] = (0.9, 0.98)
    schedule: Literal["poly", "cosine", "constant"] = "poly"
    warmup: float = 0.05
    final_lr: float = 1e-6
    clip: float = 1.0
    clip_by: Literal["all", "module", "parameter"] = "all"
    accumulate: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf:
            raise NnsslError(f"--optim.lr {self.lr}", "give a finite number above 0")
        if self.accumulate < 1:
            raise NnsslError(f"--optim.accumulate {self.accumulate}", "give at least 1")
        if not self.clip > 0:
            raise NnsslError(f"--optim.clip {self.clip}", "give a number above 0; inf switches clipping off")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise NnsslError(f"--optim.betas {self.betas}", "give two numbers from 0 to below 1")
        ends = 0.0 if self.weight_decay_end is None else self.weight_decay_end
        for name, value in (
            ("weight_decay", self.weight_decay),
            ("weight_decay_end", ends),
            ("warmup", self.warmup),
            ("final_lr", self.final_lr),
        ):
            if not 0 <= value < math.inf:
                raise NnsslError(f"--optim.{name} {value}", "give a finite number from 0 on")


@dataclass(frozen=True)
class RunSettings:
    """How one run is carried out, apart from its method.

    Attributes:
        batch_size: cases per micro-batch and process.
        seed: decides initial weights, batches, views and masks.
        device: ``cuda``, ``cpu`` or ``mps``.
        processes: processes on this node; one per GPU.
        precision: ``bf16`` (autocast) or ``32``.
        workers: reading processes per training process; 0 reads in the training process.
        compile: run the step through ``torch.compile``.
        max_skipped: non-finite steps tolerated between two checkpoints before the run rolls back.
        picture_epochs: draw pictures and write the report every so many epochs (and at the end); 0 = only at the end.
        probe_epochs: probe frozen features on labelled cases every so many epochs (and at the end); 0 = never.
        registration_pairs: labelled pairs that are registered by frozen features whenever the probe is asked; 0 = none.
        registration_cases: neighbours among these cases are the pairs; empty: among those that are learned from.
        pretrained_weights: checkpoint whose weights the run starts from.
        tracker: also send the log to TensorBoard or W&B (optional extras).
    """

    batch_size: int
    seed: int = 0
    device: Literal["cuda", "cpu", "mps"] = "cpu"
    processes: int = 1
    precision: Literal["bf16", "32"] = "32"
    workers: int = 0
    compile: bool = False
    max_skipped: int = 5
    picture_epochs: int = 10
    probe_epochs: int = 10
    registration_pairs: int = 0
    registration_cases: tuple[str, ...] = ()
    pretrained_weights: str | None = None
    tracker: Literal["none", "tensorboard", "wandb"] = "none"

    def __post_init__(self) -> None:
        counts = ("seed", "workers", "max_skipped", "picture_epochs", "probe_epochs", "registration_pairs")
        for least, names in ((1, ("batch_size", "processes")), (0, counts)):
            for name in names:
                if getattr(self, name) < least:
                    raise NnsslError(f"--{name} {getattr(self, name)}", f"give at least {least}")
