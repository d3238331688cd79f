"""A teacher that follows its student by an exponential moving average (mean teacher, arXiv:1703.01780; DINO)."""

from __future__ import annotations

import copy

import torch
from jaxtyping import Float
from torch import Tensor, nn


class EMATeacher(nn.Module):
    """A copy of a student that starts equal, shares no storage, gets no gradient and never trains: dropout and stochastic
    depth stay off in it whatever ``train()`` is called on.

    Args:
        student: its parts by name; they are copied, not kept.

    Attributes:
        parts: the copies.
    """

    def __init__(self, student: nn.ModuleDict) -> None:
        super().__init__()
        self.parts = copy.deepcopy(student).requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> EMATeacher:
        """Stays in evaluation mode."""
        super().train(False)
        return self

    @torch.no_grad()
    def move(self, student: nn.ModuleDict, momentum: float) -> None:
        """``teacher = momentum * teacher + (1 - momentum) * student``, for what the student trains; buffers are copied."""
        mine, theirs = _trained(self.parts, student)
        torch._foreach_lerp_(mine, theirs, 1 - momentum)
        for buffer, source in zip(self.parts.buffers(), student.buffers(), strict=True):
            buffer.copy_(source)


@torch.no_grad()
def weight_distance(teacher: nn.Module, student: nn.Module) -> Float[Tensor, ""]:
    """L2 distance between what the student trains and the teacher's copy of it, relative to its length; 0 = the same."""
    mine, theirs = _trained(teacher, student)
    apart = torch.stack(torch._foreach_norm(torch._foreach_sub(mine, theirs))).norm()
    return apart / torch.stack(torch._foreach_norm(theirs)).norm()


def _trained(teacher: nn.Module, student: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    pairs = zip(teacher.parameters(), student.parameters(), strict=True)
    moving = [(mine, theirs) for mine, theirs in pairs if theirs.requires_grad]
    return [mine for mine, _ in moving], [theirs for _, theirs in moving]
