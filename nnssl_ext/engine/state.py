"""What must be remembered to continue a run exactly, and how it is saved and restored."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import nn
from torch.optim import Optimizer

from nnssl_ext.checkpoints.content import checkpoint_content
from nnssl_ext.checkpoints.io import load_checkpoint, save_checkpoint
from nnssl_ext.contracts import Method
from nnssl_ext.engine.job import Job
from nnssl_ext.errors import NnsslError


@dataclass
class TrainState:
    """Where a run stands. Batches, views and every random number follow from (seed, step), so no generator is saved. What monitors
    pool is not saved either: after a resume their first figures rest on fewer steps; weights and losses do not change by that.

    Attributes:
        step: optimiser steps done, skipped ones included.
        attempt: number of roll-backs so far; it shifts the data stream, so that the same batches are not met again.
        rollback_step: step of the checkpoint of the latest roll-back, -1 if none.
        skipped: non-finite steps of the whole run.
        best: lowest epoch loss so far.
        sums: running sums of this epoch's figures and how many there were, so that a run stopped in mid-epoch logs the whole epoch.
        comparison: figures of `compare_gradients` from the first step of this epoch.
        weight_norm: norm of the trained weights when this epoch began.
        origin: the checkpoint that the run started from, see `nnssl_ext.engine.method.Beginning`; empty without one.
    """

    step: int = 0
    attempt: int = 0
    rollback_step: int = -1
    skipped: int = 0
    best: float = float("inf")
    sums: dict[str, tuple[float, int]] = field(default_factory=dict)
    comparison: dict[str, float] = field(default_factory=dict)
    weight_norm: float = 0.0
    origin: dict[str, Any] = field(default_factory=dict)


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of torch's generators for one optimiser step on one process (drop-path and the like)."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])


def data_seed(seed: int, attempt: int) -> int:
    """Seed of the data stream; a roll-back changes it."""
    return int(np.random.SeedSequence([seed, attempt]).generate_state(1)[0]) if attempt else seed


def export(job: Job, method: Method, state: TrainState) -> dict[str, Any]:
    """The checkpoint that users get: no optimiser state, no paths."""
    shapes = np.array([case.shape for case in job.cases])
    content = checkpoint_content(
        backbone=method.export_backbone(),
        plans=job.plans,
        configuration=job.plan.configuration,
        method=job.method,
        settings=asdict(job.settings),
        citations=method.citations,
        pretrained_prefixes=method.pretrained_prefixes,
        data_summary={
            "dataset": job.dataset,
            "cases": len(job.cases),
            "median_shape": [int(v) for v in np.median(shapes, axis=0)],
            "spacing": list(job.plan.spacing),
        },
        progress={"step": state.step, "total": job.total_steps, "skipped": state.skipped},
    )
    if state.origin:
        content["nnssl_ext"]["adapted_from"] = state.origin
    return content


def save_latest(path: Path, job: Job, method: nn.Module, optimizer: Optimizer, state: TrainState) -> None:
    """Write the resumable checkpoint: what users get, plus the whole method, optimiser and state."""
    content = export(job, cast(Method, method), state)
    content["resume"] = {
        "method": method.state_dict(),
        "optimizer": optimizer.state_dict(),
        "state": asdict(state),
    }
    save_checkpoint(path, content)


def load_latest(path: Path, method: nn.Module, optimizer: Optimizer) -> TrainState:
    """Restore what `save_latest` wrote, in place.

    Raises:
        NnsslError: the file is damaged, or is not a resumable checkpoint of this method.
    """
    content = load_checkpoint(path)
    if "resume" not in content:
        raise NnsslError(f"{path} cannot be continued: it holds no optimiser state", "start a new run")
    try:
        method.load_state_dict(content["resume"]["method"])
        optimizer.load_state_dict(content["resume"]["optimizer"])
    except (RuntimeError, ValueError) as error:
        raise NnsslError(f"{path} does not fit this method and network: {error}", "start a new run") from error
    return TrainState(**content["resume"]["state"])
