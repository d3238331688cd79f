"""Contrast between samples of known kinds: those of one kind should be alike (Khosla et al., arXiv:2004.11362, Eq. 2)."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F


def supervised_contrast(
    vectors: Float[Tensor, "N C"], labels: Int[Tensor, " N"], temperature: float
) -> Float[Tensor, ""]:
    """Mean over samples of the cross-entropy between the softmax of their cosines with all others, over `temperature`, and the
    others of their kind.

    Only samples that have both another of their kind and one of another kind count; without any the loss is 0. Computed in
    float32, also under autocast.

    Args:
        vectors: one per sample, of any length but 0.
        labels: the kind of each.
        temperature: of the softmax.
    """
    with torch.autocast(vectors.device.type, enabled=False):
        unit = F.normalize(vectors.float(), dim=1)
        logits = unit @ unit.T / temperature
        itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
        alike = labels[:, None] == labels
        positive = alike & ~itself
        # the lowest number and not -inf, whose gradient is NaN for a sample that is alone
        others = logits.masked_fill(itself, torch.finfo(logits.dtype).min)
        logs = torch.where(positive, logits - others.logsumexp(dim=1, keepdim=True), 0)
        losses = -logs.sum(dim=1) / positive.sum(dim=1).clamp(min=1)
        counts = positive.any(dim=1) & ~alike.all(dim=1)
        return torch.where(counts, losses, 0).sum() / counts.sum().clamp(min=1)
