"""Is the representation alive? Spread and effective rank of pooled features, and the collapse of projections.

A collapse shows as a standard deviation far below 1/sqrt(d) (SimSiam, Chen & He, arXiv:2011.10566, Sec. 4), a collapse
coefficient near 1 (thesis on IoU-cropped SimSiam), or an effective rank near 1 (RankMe, Garrido et al., arXiv:2210.02885).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from nnssl_ext.monitors.pool import Pool
from nnssl_ext.records import Step


def relative_spread(features: Float[Tensor, "N D"]) -> float:
    """Standard deviation of l2-normalised features, averaged over dimensions, times sqrt(D).

    About 1 for isotropic features at any N, 0 for a collapsed one. A standard deviation of few samples is too low even
    where their variance is not; for normal samples by the factor that is divided out here (c4 of control charts):
    .80 at N = 2, .92 at 4, .998 at 128.
    """
    normalised = functional.normalize(features.float(), dim=1)
    n = len(features)
    c4 = math.sqrt(2 / (n - 1)) * math.exp(math.lgamma(n / 2) - math.lgamma((n - 1) / 2))
    return float(normalised.std(dim=0, unbiased=True).mean() * math.sqrt(features.shape[1]) / c4)


def collapse_coefficient(features: Float[Tensor, "N D"]) -> float:
    """The thesis' max(0, 1 - sqrt(d) * s), s = mean standard deviation of l2-normalised vectors: 1 = collapsed.

    Its bias at small N is taken out (see `relative_spread`); without that, healthy vectors give .2 at N = 2.
    """
    return max(0.0, 1.0 - relative_spread(features))


def effective_rank(features: Float[Tensor, "N D"]) -> float:
    """RankMe: exponential of the entropy of the normalised singular values, between 1 and min(N, D).

    The features are centred first, so that a common offset does not pass for a direction.
    """
    values = torch.linalg.svdvals(features.float() - features.float().mean(dim=0))
    shares = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
    return float(torch.exp(torch.special.entr(shares).sum()))


class RepresentationMonitor:
    """Pools ``"features"`` of steps and says their spread and effective rank."""

    def __init__(self) -> None:
        self.pool = Pool()

    def see(self, step: Step) -> None:
        if "features" in step.watch:
            self.pool.add(step.watch["features"])

    def say(self) -> dict[str, float]:
        features = self.pool.take()
        if features is None:
            return {}
        return {"feature_spread": relative_spread(features), "effective_rank": effective_rank(features)}


class CollapseMonitor:
    """Pools the outputs of projector and predictor and says collapse coefficient and effective rank of each.

    Both heads, because a predictor that has become constant hides behind a healthy projector (methods.md 1); and the rank,
    because batch norm at the projector's end hides a collapse to few directions from the coefficient.
    """

    def __init__(self) -> None:
        self.pools = {name: Pool() for name in ("projector", "predictor")}

    def see(self, step: Step) -> None:
        for name, pool in self.pools.items():
            if name in step.watch:
                pool.add(step.watch[name])

    def say(self) -> dict[str, float]:
        said = {}
        for name, pool in self.pools.items():
            vectors = pool.take()
            if vectors is not None:
                said[f"{name}_collapse"] = collapse_coefficient(vectors)
                said[f"{name}_rank"] = effective_rank(vectors)
        return said
