"""SimSiam's heads (Chen & He, arXiv:2011.10566, Sec. 3), with batch norm over all processes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn import functional as F


class GlobalBatchNorm(nn.BatchNorm1d):
    """Batch norm with the statistics of all processes, so that two with batch B compute what one with 2B does.

    Unlike ``nn.SyncBatchNorm`` it also works on CPUs. Every process must hold the same number of rows, as the engine's do.
    """

    def forward(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        processes = dist.get_world_size() if dist.is_initialized() else 1
        if processes == 1 or not self.training:
            return super().forward(x)
        values = x.float()
        variances, means = torch.var_mean(values, dim=0, unbiased=False)
        # One sum that leaves each process's moments in a row of their own: sums of squares would lose digits.
        row = F.one_hot(torch.tensor(dist.get_rank(), device=x.device), processes).to(values.dtype)
        means, variances = all_reduce(torch.stack((means, variances))[:, None] * row[:, None])
        mean = means.mean(dim=0)
        variance = variances.mean(dim=0) + (means - mean).square().mean(dim=0)
        self._remember(mean.detach(), variance.detach(), len(x) * processes)
        normalised = (values - mean) * torch.rsqrt(variance + self.eps)
        if self.affine:
            normalised = torch.addcmul(self.bias, normalised, self.weight)
        return normalised.to(x.dtype)

    def _remember(self, mean: Float[Tensor, " D"], variance: Float[Tensor, " D"], rows: int) -> None:
        """Move the running statistics, as ``nn.BatchNorm1d`` does."""
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        assert self.momentum is not None
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * rows / (rows - 1), self.momentum)
        self.num_batches_tracked += 1


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
