"""SimSiam's heads (Chen & He, arXiv:2011.10566, Sec. 3), with batch norm over all processes."""

from __future__ import annotations

from torch import nn

from nnssl_ext.networks.global_batch_norm import GlobalBatchNorm


def projector(in_dim: int, dim: int) -> nn.Sequential:
    """Three linear layers of `dim` outputs with batch norm, ReLU after the first two; the last norm has no gain or bias."""
    return nn.Sequential(
        nn.Linear(in_dim, dim, bias=False),
        GlobalBatchNorm(dim),
        nn.ReLU(inplace=True),
        nn.Linear(dim, dim, bias=False),
        GlobalBatchNorm(dim),
        nn.ReLU(inplace=True),
        nn.Linear(dim, dim, bias=False),
        GlobalBatchNorm(dim, affine=False),
    )


def predictor(dim: int, hidden: int) -> nn.Sequential:
    """A bottleneck of `hidden` units with batch norm and ReLU; the output layer has a bias and no norm."""
    return nn.Sequential(
        nn.Linear(dim, hidden, bias=False),
        GlobalBatchNorm(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, dim),
    )
