"""KoLeo: spread the crops of a batch evenly over the sphere.

Sablayrolles et al., "Spreading vectors for similarity search", arXiv:1806.03198, Eq. 2, as DINOv2 (arXiv:2304.07193) uses it.
Letters: V views, B cases, C channels.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from nnssl_ext.errors import NnsslError

EPS = 1e-8
"""DINOv2's; added to distances, it keeps duplicates finite: -ln(1e-8) = 18.4."""


def koleo_loss(features: Float[Tensor, "V B C"]) -> Float[Tensor, ""]:
    """Minus the mean log distance of l2-normalised vectors to their nearest neighbour in the same view of other cases.

    Views are summed, as DINOv2 does with its two, and never mixed: two crops of one case are meant to be near each other. In
    float32; only the cases of this process are neighbours.

    Args:
        features: of the backbone, before any head.

    Raises:
        NnsslError: a batch of one, which has no neighbours.
    """
    if features.shape[1] < 2:
        raise NnsslError(
            "KoLeo spreads the cases of a batch apart, and this batch has one",
            "raise --batch_size, or set --koleo_weight 0",
        )
    with torch.autocast(features.device.type, enabled=False):
        points = F.normalize(features.float(), dim=-1)
        with torch.no_grad():
            similarity = points @ points.mT
            similarity.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
            nearest = similarity.argmax(dim=-1, keepdim=True).expand_as(points)
        distances = F.pairwise_distance(points, points.gather(1, nearest), eps=EPS)
        return -(distances + EPS).log().mean(dim=1).sum()
