"""The DINO loss: a student predicts, from every crop, what the teacher says about the other global crops.

Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", arXiv:2104.14294, Eq. 3.
Letters: V crops of a case as the student sees them, the G global ones first, B cases, K prototypes.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

ENTROPY_SAMPLE = 512
"""About as many tokens tell their mean entropy to 1 %, at no cost beside the loss of thousands."""


def dino_loss(
    student: Float[Tensor, "V B K"], teacher: Float[Tensor, "G B K"], temperature: float
) -> Float[Tensor, ""]:
    """Mean cross-entropy over cases and pairs of different crops: 2 globals and 8 locals make 2 * 10 - 2 = 18 pairs.

    Args:
        student: logits.
        teacher: probabilities.
        temperature: the student's; DINO: 0.1.
    """
    with torch.autocast(student.device.type, enabled=False):
        logits = student.float() / temperature
        # -sum q log softmax(s) = logsumexp(s) - sum q s, because q sums to 1
        agreement = torch.einsum("gbk,vbk->gv", teacher, logits) / logits.shape[1]
        pairs = logits.logsumexp(dim=-1).mean(dim=1) - agreement
        return (pairs.sum() - pairs.diagonal().sum()) / (pairs.numel() - len(pairs))


def entropy(probabilities: Float[Tensor, "*shape K"]) -> Float[Tensor, ""]:
    """Mean entropy in nats."""
    return torch.special.entr(probabilities).sum(dim=-1).mean()


def teacher_figures(
    dino: Float[Tensor, ""], crops: Float[Tensor, "G B K"], tokens: Float[Tensor, "N P"] | None
) -> dict[str, Float[Tensor, ""]]:
    """What tells a collapse from a success, to be logged.

    ``teacher_entropy``, ``patch_entropy``: entropy of the teacher's probabilities over its maximum, ln K; 1 = uniform, 0 = one
    prototype. ``kl``: what the student still gets wrong, cross-entropy minus entropy. ``dino_of_ln_k``: the loss over ln K,
    its value when both sides are uniform.

    Args:
        dino: the loss.
        crops, tokens: teacher probabilities.
    """
    uniform = math.log(crops.shape[-1])
    certain = entropy(crops)
    figures = {"teacher_entropy": certain / uniform, "kl": dino - certain, "dino_of_ln_k": dino / uniform}
    if tokens is not None and len(tokens):
        sample = tokens[:: max(1, len(tokens) // ENTROPY_SAMPLE)]
        figures["patch_entropy"] = entropy(sample) / math.log(tokens.shape[-1])
    return {name: value.detach() for name, value in figures.items()}
