"""Sums and maxima over the processes of a run, without gradient. One process alone gets its own values back."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch import distributed as dist


def several_processes() -> bool:
    """Whether this process trains together with others."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@torch.no_grad()
def sum_over_processes(values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The sum of every process's `values`, the same on all of them."""
    return _reduced(values, dist.ReduceOp.SUM)


@torch.no_grad()
def max_over_processes(values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The largest of every process's `values`, element by element."""
    return _reduced(values, dist.ReduceOp.MAX)


def _reduced(values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    values = values.detach()
    if several_processes():
        values = values.clone()
        dist.all_reduce(values, operation)
    return values
