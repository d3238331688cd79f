"""NT-Xent between two views of many places (SimCLR, Chen et al., arXiv:2002.05709, Eq. 1; over voxels as in vox2vec,
arXiv:2307.14725, Eq. 1)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

ROWS = 1024
"""Rows of the similarity matrix held at a time. vox2vec's 10,240 pairs need 1.7 GB for all of it in float32, and 84 MB so."""


def nt_xent(
    first: Float[Tensor, "B N D"],
    second: Float[Tensor, "B N D"],
    valid: Bool[Tensor, "B N"],
    temperature: float,
    rows: int = ROWS,
) -> Float[Tensor, ""]:
    """Each of a case's 2N embeddings should be nearer to its partner in the other view than to the 2N - 2 others.

    With ``S_ab = e_a e_b^T / temperature`` the first view's voxel i costs ``-S12_ii + log(sum_{j != i} exp S11_ij + sum_j exp
    S12_ij)``, the second's the same with views exchanged; the mean over both is vox2vec's ``(L1 + L2) / 2``.

    Negatives come from the same case, as in vox2vec, whose batch is one case: so the loss of a batch is the mean of the losses
    of its cases, on however many processes. Rows of the similarity matrix are computed in turn, and again for the gradient.

    Args:
        first, second: l2-normalised embeddings of N voxels of a case in its two views.
        valid: pairs that count, as anchors and as negatives.
        rows: of the matrix, at a time.

    Returns:
        Mean over the valid embeddings of a case, then over cases; in float32. ``ln(2N - 1)`` for N valid pairs that are all
        equal, 0 for a case without any.
    """
    with torch.autocast(first.device.type, enabled=False):
        vectors = torch.cat((first, second), dim=1).float()
        counts = valid.repeat(1, 2)
        count = vectors.shape[1]
        if count <= rows:
            losses = _row_losses(vectors, counts, 0, count, temperature)
        else:
            parts = [
                checkpoint(
                    _row_losses, vectors, counts, start, min(start + rows, count), temperature, use_reentrant=False
                )
                for start in range(0, count, rows)
            ]
            losses = torch.cat(parts, dim=1)
        per_case = torch.where(counts, losses, 0).sum(dim=1) / counts.sum(dim=1).clamp(min=1)
        return per_case.mean()


def _row_losses(
    vectors: Float[Tensor, "B M D"], counts: Bool[Tensor, "B M"], start: int, stop: int, temperature: float
) -> Float[Tensor, "B R"]:
    """Losses of embeddings `start` to `stop`; finite also where one does not count, since its partner is always compared."""
    count = vectors.shape[1]
    logits = vectors[:, start:stop] @ vectors.mT / temperature
    itself = torch.arange(start, stop, device=vectors.device)
    partner = (itself + count // 2) % count
    column = torch.arange(count, device=vectors.device)
    left_out = ~counts[:, None] & (column != partner[:, None]) | (column == itself[:, None])
    logits = logits.masked_fill(left_out, -torch.inf)
    positives = logits.gather(2, partner[None, :, None].expand(len(vectors), -1, 1))[..., 0]
    return logits.logsumexp(dim=2) - positives
