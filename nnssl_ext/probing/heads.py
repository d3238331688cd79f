"""Classifiers of voxels on a frozen feature pyramid (vox2vec, Goncharov et al., MICCAI 2023, arXiv:2307.14725): a 1x1x1
convolution per level, added up from coarse to fine; the non-linear head has a residual block after every addition.

All layers act voxel by voxel, so heads learn from single voxels, and what stands before the interpolation to voxels runs at each
level's own resolution where it is coarse. Deviations from the released code: levels are interpolated straight to the voxel,
linearly by default; the linear head is a logistic regression at its optimum; the non-linear one has one width for all levels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from nnssl_ext.monitors.probe import fit_linear
from nnssl_ext.probing.settings import ProbeSettings
from nnssl_ext.probing.table import Level, Pyramid, transformed

Rows = Sequence[Float[Tensor, "N _C"]]
"""One row per voxel and level, finest first."""


class LinearHead(nn.Module):
    """Logits are the sum of one linear map per level.

    Args:
        channels: per level, finest first.
    """

    def __init__(self, channels: Sequence[int], classes: int) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(nn.Linear(count, classes, bias=not place) for place, count in enumerate(channels))

    def combine(self, rows: Rows) -> Float[Tensor, "N K"]:
        """Logits of voxels from what `laterals` made of their features."""
        total = rows[-1]
        for row in reversed(rows[:-1]):
            total = total + row
        return total

    def forward(self, rows: Rows) -> Float[Tensor, "N K"]:
        """Logits of voxels from their features."""
        return self.combine([lateral(row) for lateral, row in zip(self.laterals, rows, strict=True)])


class ResidualBlock(nn.Module):
    """Two 1x1x1 convolutions, each after a batch norm and ReLU, beside the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers = [(nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width)) for _ in range(2)]
        self.layers = nn.Sequential(*(layer for part in layers for layer in part))

    def forward(self, x: Float[Tensor, "N W"]) -> Float[Tensor, "N W"]:
        return x + self.layers(x)


class NonlinearHead(nn.Module):
    """A pyramid of residual 1x1x1 blocks.

    Args:
        channels: per level, finest first.
        width: channels that every level is brought to.
    """

    def __init__(self, channels: Sequence[int], classes: int, width: int) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(nn.Linear(count, width) for count in channels)
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in channels)
        self.out = nn.Linear(width, classes)

    def combine(self, rows: Rows) -> Float[Tensor, "N K"]:
        """Logits of voxels from what `laterals` made of their features."""
        x = self.blocks[-1](rows[-1])
        for block, row in zip(list(self.blocks)[-2::-1], rows[-2::-1], strict=True):
            x = block(x + row)
        return self.out(x)

    def forward(self, rows: Rows) -> Float[Tensor, "N K"]:
        """Logits of voxels from their features."""
        return self.combine([lateral(row) for lateral, row in zip(self.laterals, rows, strict=True)])


Head = LinearHead | NonlinearHead


def project(head: Head, pyramid: Pyramid) -> list[Level]:
    """What the head's first layers make of every level: coarse maps at their own resolution, others when they are asked."""
    return [transformed(level, lateral) for lateral, level in zip(head.laterals, pyramid, strict=True)]


def teach_linear(rows: Rows, labels: Int[Tensor, " N"], importance: Float[Tensor, " K"]) -> LinearHead:
    """The head at the optimum of the regularised logistic regression that the online probe fits too.

    Args:
        rows: standardised features.
        importance: what a voxel of each class counts.
    """
    weight, bias = fit_linear(torch.cat(list(rows), dim=1), labels, importance)
    channels = [row.shape[1] for row in rows]
    head = LinearHead(channels, len(importance)).to(weight.device)
    parts = dict(
        zip((f"laterals.{place}.weight" for place in range(len(rows))), weight.T.split(channels, dim=1), strict=True)
    )
    head.load_state_dict({**parts, "laterals.0.bias": bias})
    return head.eval().requires_grad_(False)


def teach_nonlinear(
    rows: Rows,
    labels: Int[Tensor, " N"],
    importance: Float[Tensor, " K"],
    represents: Float[Tensor, " K"],
    settings: ProbeSettings,
    seed: int,
) -> NonlinearHead:
    """Train the head with Adam on weighted cross-entropy and soft Dice.

    Args:
        rows: standardised features.
        importance: what a voxel of each class counts in the cross-entropy.
        represents: for how many voxels of the cases one of each class stands, up to a factor; what it counts in the Dice.
        seed: of initial weights and batches.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = NonlinearHead([row.shape[1] for row in rows], len(importance), settings.width).to(labels.device)
        order = [torch.randint(len(labels), (settings.batch_size,)) for _ in range(settings.iterations)]
    optimizer = torch.optim.Adam(head.parameters(), lr=settings.lr)
    with torch.enable_grad():
        for step, drawn in enumerate(order):
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * 0.5 * (1 + math.cos(math.pi * step / settings.iterations))
            chosen = drawn.to(labels.device)
            logits, truth = head([row[chosen] for row in rows]), labels[chosen]
            loss = functional.cross_entropy(logits, truth, weight=importance)
            loss = loss + 1 - soft_dice(logits.softmax(dim=1), truth, represents)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return head.eval().requires_grad_(False)


def soft_dice(
    probabilities: Float[Tensor, "N K"], labels: Int[Tensor, " N"], represents: Float[Tensor, " K"]
) -> Float[Tensor, ""]:
    """Soft Dice, mean over the foreground classes that occur, of the voxels that the given ones stand for.

    Args:
        represents: how many voxels one of each class stands for, up to a factor.
    """
    truth = functional.one_hot(labels, probabilities.shape[1]).to(probabilities.dtype)
    counts = represents[labels][:, None]
    both = (counts * probabilities * truth).sum(dim=0)
    either = (counts * (probabilities + truth)).sum(dim=0)
    occurs = truth.any(dim=0)
    occurs[0] = False
    return (2 * both / either.clamp(min=1e-9))[occurs].mean() if occurs.any() else probabilities.new_ones(())
