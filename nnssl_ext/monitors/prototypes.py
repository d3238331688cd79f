"""How a self-distilling teacher uses its prototypes (DINO's outputs)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from nnssl_ext.records import Step

USED = 0.1
"""A prototype counts as used when its mean probability is at least this share of the uniform one; our choice."""


class PrototypeMonitor:
    """Averages the teacher's probabilities over steps.

    Says for ``"prototypes"`` (crops) and ``"patch_prototypes"`` (masked tokens): ``..._used``, the share of used ones,
    and ``..._entropy``, the entropy of the mean probabilities over ln K. It is at least the mean entropy of single
    outputs; the difference is what the output tells about the input, 0 in every collapse.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Float[Tensor, " K"]] = {}

    def see(self, step: Step) -> None:
        for name in ("prototypes", "patch_prototypes"):
            if name in step.watch:
                usage = step.watch[name].float()
                self.sums[name] = self.sums[name] + usage if name in self.sums else usage

    def say(self) -> dict[str, float]:
        said = {}
        for name, total in self.sums.items():
            usage, number = total / total.sum(), len(total)
            said[f"{name}_used"] = float((usage >= USED / number).float().mean())
            said[f"{name}_entropy"] = float(torch.special.entr(usage).sum()) / math.log(number)
        self.sums = {}
        return said
