"""Is the representation alive? Spread and effective rank of pooled features.

A collapse shows as a standard deviation far below 1/sqrt(d) (SimSiam, Chen & He, arXiv:2011.10566, Sec. 4) or an
effective rank near 1 (RankMe, Garrido et al., arXiv:2210.02885).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from nnssl_ext.records import Step


def relative_spread(features: Float[Tensor, "N D"]) -> float:
    """Standard deviation of l2-normalised features, averaged over dimensions, times sqrt(D).

    About 1 for isotropic features, 0 for a collapsed one. Unbiased over N; small N still lowers it.
    """
    normalised = functional.normalize(features.float(), dim=1)
    return float(normalised.std(dim=0, unbiased=True).mean() * math.sqrt(features.shape[1]))


def effective_rank(features: Float[Tensor, "N D"]) -> float:
    """RankMe: exponential of the entropy of the normalised singular values, between 1 and min(N, D).

    The features are centred first, so that a common offset does not pass for a direction.
    """
    values = torch.linalg.svdvals(features.float() - features.float().mean(dim=0))
    shares = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
    return float(torch.exp(torch.special.entr(shares).sum()))


class RepresentationMonitor:
    """Pools the latest ``"features"`` of steps and says their spread and effective rank.

    Args:
        pool: vectors kept; below 128 the spread is biased low (measured in the thesis on IoU-cropped SimSiam).
    """

    def __init__(self, pool: int = 512) -> None:
        self.pool = pool
        self.seen: list[Float[Tensor, "N D"]] = []

    def see(self, step: Step) -> None:
        if "features" in step.watch:
            self.seen.append(step.watch["features"])
            while sum(map(len, self.seen[1:])) >= self.pool:
                self.seen.pop(0)

    def say(self) -> dict[str, float]:
        features = torch.cat(self.seen) if self.seen else torch.empty(0, 1)
        self.seen = []
        if len(features) < 2:
            return {}
        return {"feature_spread": relative_spread(features), "effective_rank": effective_rank(features)}
