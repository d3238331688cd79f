"""Batch norm over all processes, on any device."""

from __future__ import annotations

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce


class GlobalBatchNorm(nn.BatchNorm1d):
    """Batch norm with the statistics of all processes, so that two with batch B compute what one with 2B does.

    Unlike ``nn.SyncBatchNorm`` it also works on CPUs, and rows may be left out of the statistics. Every process must hold the
    same number of rows, as the engine's do, but not of rows that count.
    """

    def forward(self, x: Float[Tensor, "N D"], valid: Bool[Tensor, " N"] | None = None) -> Float[Tensor, "N D"]:
        """Normalise all rows, while training by the moments of the `valid` ones (None = all)."""
        processes = dist.get_world_size() if dist.is_initialized() else 1
        if not self.training or (processes == 1 and valid is None):
            return super().forward(x)
        values = x.float()
        weight = torch.ones_like(values[:, :1]) if valid is None else valid[:, None].to(values.dtype)
        count = weight.sum()
        mean = (values * weight).sum(dim=0) / count.clamp(min=1)
        variance = ((values - mean).square() * weight).sum(dim=0) / count.clamp(min=1)
        if processes > 1:
            # One sum that leaves each process's moments in a row of their own: sums of squares would lose digits.
            row = (torch.arange(processes, device=x.device) == dist.get_rank()).to(values.dtype)
            moments = torch.stack((count.expand_as(mean), mean, variance))
            counts, means, variances = all_reduce(moments[:, None] * row[:, None])
            count = counts[:, 0].sum()
            shares = counts / count.clamp(min=1)
            mean = (shares * means).sum(dim=0)
            variance = (shares * (variances + (means - mean).square())).sum(dim=0)
        self._remember(mean.detach(), variance.detach(), count)
        normalised = (values - mean) * torch.rsqrt(variance + self.eps)
        if self.affine:
            normalised = torch.addcmul(self.bias, normalised, self.weight)
        return normalised.to(x.dtype)

    def _remember(self, mean: Float[Tensor, " D"], variance: Float[Tensor, " D"], rows: Float[Tensor, ""]) -> None:
        """Move the running statistics, as ``nn.BatchNorm1d`` does; fewer than two rows have none."""
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        assert self.momentum is not None
        momentum = self.momentum * (rows > 1)
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance * rows / (rows - 1).clamp(min=1), momentum)
        self.num_batches_tracked += 1
