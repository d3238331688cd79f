"""From a teacher's logits to the probabilities that a student learns to predict.

Without balance over the prototypes, teacher and student agree on one output for everything. Two remedies: subtracting a
moving mean of the logits (DINO, Caron et al., arXiv:2104.14294, Eq. 4), or Sinkhorn-Knopp, which gives every prototype the
same share of the samples (SwAV, Caron et al., arXiv:2006.09882; DINOv2, Oquab et al., arXiv:2304.07193).

Letters: N samples, K prototypes. Everything here runs in float32, whatever the precision of the logits: their exponentials
do not fit into half precision.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nnssl_ext.objectives.processes import max_over_processes, sum_over_processes

Centring = Literal["centre", "sinkhorn", "none"]
SINKHORN_ITERATIONS = 3
"""SwAV and DINOv2."""


def sinkhorn_knopp(
    logits: Float[Tensor, "N K"], temperature: float | Float[Tensor, ""], iterations: int = SINKHORN_ITERATIONS
) -> Float[Tensor, "N K"]:
    """Probabilities close to ``softmax(logits / temperature)`` of which every prototype gets about the same share.

    The matrix ``exp(logits / temperature)`` is scaled by one factor per prototype, then by one per sample, in turn. Samples of
    all processes count, however many each has. The last scaling is per sample: rows sum to 1. Factors and sums are logarithms,
    so that however far logits are apart nothing overflows and nothing vanishes.
    """
    with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
        scaled = logits.float() / temperature
        per_sample = scaled.new_zeros(len(scaled))
        per_prototype = scaled.new_zeros(scaled.shape[1])
        for _ in range(iterations):
            weights = scaled + per_sample[:, None]
            highest = weights.amax(dim=0) if len(weights) else torch.full_like(per_prototype, -torch.inf)
            highest = max_over_processes(highest)
            per_prototype = -(highest + sum_over_processes(weights.sub_(highest).exp_().sum(dim=0)).log())
            per_sample = -torch.logsumexp(scaled + per_prototype, dim=1)
        return torch.exp(scaled + per_prototype + per_sample[:, None])


class TeacherTargets(nn.Module):
    """Teacher probabilities by one of the remedies, or by none, for one head.

    The centre used in a step is the one of the steps before: it moves in `after_step`, once, over all samples that the step's
    micro-batches saw on all processes. What a step saw that was broken off is forgotten.

    Args:
        prototypes: K.
        centring: the remedy; ``none`` collapses and is there to be watched.
        momentum: share of the centre that a step keeps; DINO: 0.9.

    Attributes:
        centre: ``(K,)`` moving mean of the teacher's logits.
    """

    centre: Float[Tensor, " K"]
    seen: Float[Tensor, " K+1"]

    def __init__(self, prototypes: int, centring: Centring, momentum: float = 0.9) -> None:
        super().__init__()
        self.centring = centring
        self.momentum = momentum
        self.register_buffer("centre", torch.zeros(prototypes))
        self.register_buffer("seen", torch.zeros(prototypes + 1), persistent=False)  # sum of logits, and their number

    @torch.no_grad()
    def forward(self, logits: Float[Tensor, "*n K"], temperature: float | Float[Tensor, ""]) -> Float[Tensor, "*n K"]:
        """The probabilities; takes note of the logits for the centre."""
        leading, logits = logits.shape[:-1], logits.flatten(0, -2).float()
        if self.centring == "sinkhorn":
            return sinkhorn_knopp(logits, temperature).unflatten(0, leading)
        if self.centring == "centre":
            seen = torch.cat([logits.sum(dim=0), logits.new_full((1,), len(logits))])
            # Summed over processes at once: DDP copies the first process's buffers to the others before every pass.
            self.seen += sum_over_processes(seen)
        return ((logits - self.centre) / temperature).softmax(dim=-1).unflatten(0, leading)

    def before_step(self) -> None:
        """Forget what an unfinished step saw."""
        self.seen.zero_()

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the centre to what the step saw; stay where it saw nothing."""
        total, count = self.seen[:-1], self.seen[-1]
        self.centre.lerp_(total / count.clamp(min=1), (1 - self.momentum) * count.clamp(max=1))
