"""What arrived from a pretrained checkpoint, and putting back what is not wanted.

nnU-Net's loader fills the network between its construction and the start of training without leaving a trace, so the
initial weights are kept aside and compared.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nnssl_ext.trainers.finetuning.groups import Half, half_of


@dataclass(frozen=True)
class Arrival:
    """How many of a half's tensors differ from their initialisation."""

    changed: int
    total: int

    def __str__(self) -> str:
        return f"{self.changed} of {self.total}"


def snapshot(network: nn.Module) -> dict[str, Tensor]:
    """CPU copies of all parameters, each once however many names it has."""
    return {name: p.detach().cpu().clone() for name, p in network.named_parameters()}


def arrivals(network: nn.Module, initial: dict[str, Tensor]) -> dict[Half, Arrival]:
    """Per half, the tensors that differ from `initial`."""
    counts: dict[Half, list[bool]] = {"encoder": [], "decoder": [], "head": []}
    for name, parameter in network.named_parameters():
        counts[half_of(name)].append(not torch.equal(parameter.detach().cpu(), initial[name]))
    return {half: Arrival(sum(changed), len(changed)) for half, changed in counts.items()}


@torch.no_grad()
def restore(network: nn.Module, initial: dict[str, Tensor], half: Half) -> None:
    """Put one half back to `initial`, in place, so that every alias (``decoder.encoder.*``) follows."""
    for name, parameter in network.named_parameters():
        if half_of(name) == half:
            parameter.copy_(initial[name])
