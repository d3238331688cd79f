"""Sums and maxima over the processes of a run, without gradient, and rows of all of them, with it. One process alone gets its
own values back."""

from __future__ import annotations

import torch
from jaxtyping import Float, Shaped
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


def gather_over_processes(rows: Shaped[Tensor, "*own"]) -> Shaped[Tensor, "*all"]:
    """The rows of all processes, each of which has as many, in the order of processes.

    Gradients reach the own rows only, times the number of processes, because data-parallel training averages over them: a
    loss of all rows, which every process computes, then moves the parameters as it would in one process.
    """
    if not several_processes():
        return rows
    gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, rows.detach().contiguous())
    if rows.requires_grad:
        gathered[dist.get_rank()] = rows.detach() + (rows - rows.detach()) * len(gathered)
    return torch.cat(gathered)


def _reduced(values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    values = values.detach()
    if several_processes():
        values = values.clone()
        dist.all_reduce(values, operation)
    return values
