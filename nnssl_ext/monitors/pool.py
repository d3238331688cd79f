"""Vectors of several steps, pooled: what a few crops say about spread or collapse says little."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

ENOUGH = 128
"""Vectors that figures of spread are said of, at least. The collapse coefficient of healthy ones, without correction for their
number, is .035 for 8 and .002 for 128 (methods.md 1); that 128 are enough for ranks is our choice."""


class Pool:
    """The latest vectors under one name. It stays on the device until it is asked.

    Args:
        size: vectors kept, and a little more.
    """

    def __init__(self, size: int = 512) -> None:
        self.size = size
        self.seen: list[Float[Tensor, "N D"]] = []

    def __len__(self) -> int:
        return sum(map(len, self.seen))

    def add(self, vectors: Float[Tensor, "N D"]) -> None:
        """Take vectors in, let the oldest go."""
        self.seen.append(vectors)
        while sum(map(len, self.seen[1:])) >= self.size:
            self.seen.pop(0)

    def take(self) -> Float[Tensor, "N D"] | None:
        """All of them in float32, and start anew; None, and keep collecting, while there are fewer than `ENOUGH`."""
        if len(self) < ENOUGH:
            return None
        vectors = torch.cat(self.seen).float()
        self.seen = []
        return vectors
