"""One optimiser step: forward, backward, clip, move. The order of the parts is tested."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim import Optimizer

from nnssl_ext.contracts import Progress
from nnssl_ext.data.loader import RegionBatch
from nnssl_ext.engine.gradients import compare_gradients
from nnssl_ext.engine.job import Job
from nnssl_ext.engine.optim import Schedule, clip_gradients
from nnssl_ext.engine.state import TrainState, step_seed
from nnssl_ext.records import Step, View
from nnssl_ext.views.cut import cut_views


class Outcome:
    """Carries a `Step` through Fabric and DDP, which search containers and dataclasses for tensors and refuse frozen
    ones."""

    def __init__(self, step: Step) -> None:
        self.step = step


class StepGraph(nn.Module):
    """One step of a method as one forward pass, so that DDP and ``torch.compile`` see one graph.

    Args:
        method: what to run.
        autocast: run it in bfloat16 where that is safe.
    """

    def __init__(self, method: nn.Module, autocast: bool) -> None:
        super().__init__()
        self.method = method
        self.autocast = autocast

    def forward(self, views: tuple[View, ...]) -> tuple[Tensor, Outcome]:
        """The loss, for the backward pass, and the whole step."""
        with torch.autocast(views[0].voxels.device.type, torch.bfloat16, enabled=self.autocast):
            step: Step = self.method(views)
        return step.loss, Outcome(step)


@dataclass(frozen=True)
class Parts:
    """What a training step works with on this process: the method, and its wrapping for devices and processes."""

    fabric: Fabric
    job: Job
    method: Any
    graph: Any
    optimizer: Optimizer
    schedule: Schedule


def optimizer_step(parts: Parts, micro_batches: Sequence[RegionBatch], state: TrainState) -> list[Step] | None:
    """Do one optimiser step and count it in ``state``.

    The gradient norm is the one value read from the device per step: under data parallelism it is the same on every
    process, so all of them agree on skipping. ``method.after_step`` follows the movement of the parameters.

    In the first step of an epoch the gradients of the loss's terms are compared, on the first micro-batch.

    Returns:
        The steps of the micro-batches, the last with ``grad_norm`` among its terms; None when the gradient was not
        finite, in which case nothing moved.
    """
    fabric = parts.fabric
    torch.manual_seed(step_seed(parts.job.run.seed, state.step, fabric.global_rank))
    parts.schedule.apply(parts.optimizer, state.step)
    parts.optimizer.zero_grad(set_to_none=True)
    parts.method.before_step(Progress(state.step, parts.job.total_steps))
    compare = state.step % parts.job.settings.iterations == 0
    comparison: dict[str, float] = {}
    steps = []
    for number, batch in enumerate(micro_batches, start=1):
        last = number == len(micro_batches)
        with fabric.no_backward_sync(parts.graph, enabled=not last and fabric.world_size > 1):
            loss, outcome = parts.graph(cut_views(batch, fabric.device))
            if compare and number == 1:
                comparison = compare_gradients(fabric, outcome.step.parts, parts.method.parameters())
            fabric.backward(loss / len(micro_batches))
        steps.append(outcome.step)
    norm = clip_gradients(parts.method, parts.job.settings.optim)
    state.step += 1
    if not torch.isfinite(norm):
        return None
    state.comparison.update(comparison)
    parts.optimizer.step()
    parts.method.after_step(Progress(state.step, parts.job.total_steps))
    steps[-1].terms["grad_norm"] = norm.detach()
    return steps
