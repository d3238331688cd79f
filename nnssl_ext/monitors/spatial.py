"""Do places within a crop differ? In a spatial collapse all tokens of a crop are alike while crops differ."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from nnssl_ext.monitors.pool import ENOUGH
from nnssl_ext.records import Step


def token_similarity(tokens: Float[Tensor, "N T C"]) -> Float[Tensor, ""]:
    """Mean cosine similarity of two different places of one crop: 1 = all alike (the off-diagonal of the Gram matrix)."""
    unit = functional.normalize(tokens.float(), dim=2)
    places = tokens.shape[1]
    return ((unit.sum(dim=1).square().sum(dim=1) - places) / (places * (places - 1))).mean()


class SpatialMonitor:
    """Watches ``"tokens"``.

    Says ``token_similarity``, and ``token_variance_share``: the variance across places within crops as a share of the
    variance of all tokens of all crops. Near 0 in a spatial collapse (dino.md 4); 1 when the mean tokens of crops agree.
    Only sums are kept, not tokens.
    """

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self.similarities: list[Float[Tensor, ""]] = []
        self.within: list[Float[Tensor, ""]] = []
        self.means: list[Float[Tensor, "N C"]] = []

    def see(self, step: Step) -> None:
        if "tokens" not in step.watch or step.watch["tokens"].shape[1] < 2:
            return
        tokens = step.watch["tokens"].float()
        self.similarities.append(token_similarity(tokens))
        self.within.append(tokens.var(dim=1, unbiased=False).sum(dim=1).mean())
        self.means.append(tokens.mean(dim=1))

    def say(self) -> dict[str, float]:
        if not self.means:
            return {}
        # the latest steps only, where the network hardly moved: its drift would pass for a difference between crops
        means = torch.cat(self.means[-ENOUGH // len(self.means[-1]) :])
        within, between = torch.stack(self.within).mean(), means.var(dim=0, unbiased=False).sum()
        share = within / (within + between).clamp(min=torch.finfo(within.dtype).tiny)
        similarity = torch.stack(self.similarities).mean()
        self._forget()
        return {"token_similarity": float(similarity), "token_variance_share": float(share)}
