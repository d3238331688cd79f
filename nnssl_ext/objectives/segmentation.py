"""The loss of a classification of voxels."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from nnssl_ext.objectives.correspondence import overlap_loss


def segmentation_loss(
    logits: Float[Tensor, "_labels Z Y X"], shares: Float[Tensor, "K Z Y X"], weight: Float[Tensor, "Z Y X"]
) -> Float[Tensor, ""]:
    """Cross-entropy, mean over voxels, plus one minus the mean soft Dice of the foreground: nnU-Net's loss (Isensee et al. 2021),
    for cells that labels may share.

    Args:
        logits: background first.
        shares: of each label in a cell; what is left is background.
        weight: how much each cell counts.
    """
    targets = torch.cat((1 - shares.sum(0, keepdim=True), shares))
    entropy = F.cross_entropy(logits[None], targets[None], reduction="none")[0]
    entropy = (entropy * weight).sum() / weight.sum().clamp(min=1e-6)
    return entropy + overlap_loss(shares, logits.softmax(0)[1:], weight)
