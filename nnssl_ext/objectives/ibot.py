"""The iBOT loss: the student predicts the teacher's view of tokens that were hidden from it.

Zhou et al., "iBOT: Image BERT Pre-Training with Online Tokenizer", arXiv:2111.07832, Eq. 2.
Letters: C crops, N hidden tokens of all of them together, K prototypes, ``z y x`` the token grid.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def hidden_tokens(mask: Bool[Tensor, "C z y x"]) -> tuple[Int[Tensor, " N"], Float[Tensor, " N"]]:
    """Where the hidden tokens are among all C * z * y * x, and the weight of each: 1 / hidden tokens of its crop.

    Call it with a mask on the CPU: their number decides shapes, and a device would have to be waited for.
    """
    rows = mask.flatten(1)
    weights = 1 / rows.sum(dim=1).clamp(min=1)
    return rows.flatten().nonzero()[:, 0], weights[:, None].expand(rows.shape)[rows]


def ibot_loss(
    student: Float[Tensor, "N K"],
    teacher: Float[Tensor, "N K"],
    weights: Float[Tensor, " N"],
    crops: int,
    temperature: float,
) -> Float[Tensor, ""]:
    """Cross-entropy over hidden tokens, averaged within each crop, then over all crops: one without hidden tokens counts 0.

    So with every other crop masked the term weighs half as much as one over masked crops only would, as in DINOv2.

    Args:
        student: logits at hidden tokens.
        teacher: probabilities at the same tokens of the unmasked crops.
        weights: of `hidden_tokens`.
        crops: C, with and without hidden tokens.
        temperature: the student's; iBOT: 0.1.
    """
    with torch.autocast(student.device.type, enabled=False):
        logits = student.float() / temperature
        cross_entropy = logits.logsumexp(dim=-1) - (teacher * logits).sum(dim=-1)
        return (weights * cross_entropy).sum() / crops
