"""Settings from development pairs: the regularisation that reaches a wanted smoothness, then the best of the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BEYOND = 4.0
"""How far outside of the strengths tried a wanted smoothness is looked for, as a factor."""


@dataclass(frozen=True)
class Curve:
    """Means over development pairs, for every strength of regularisation.

    Attributes:
        strengths: ascending.
        sdlogj: std of the log Jacobian determinant.
        score: higher is better: Dice, or the negative distance of landmarks.
    """

    strengths: tuple[float, ...]
    sdlogj: tuple[float, ...]
    score: tuple[float, ...]

    def strength_at(self, sdlogj: float) -> float:
        """The strength that reaches this smoothness: log SDlogJ is interpolated linearly in log strength, and continued at most
        `BEYOND` outside of the curve."""
        x = np.log(self.strengths)
        y = np.minimum.accumulate(np.log(np.maximum(self.sdlogj, 1e-6)))  # stronger is smoother, but for noise
        wanted = float(np.log(sdlogj))
        if y[-1] <= wanted <= y[0]:
            return float(np.exp(np.interp(wanted, y[::-1], x[::-1])))
        inner, end = (1, 0) if wanted > y[0] else (-2, -1)
        slope = (y[end] - y[inner]) / (x[end] - x[inner]) if len(x) > 1 else 0.0
        step = (wanted - y[end]) / min(slope, -0.2)
        return float(np.exp(x[end] + np.clip(step, -np.log(BEYOND), np.log(BEYOND))))

    def score_at(self, strength: float) -> float:
        """The score at a strength, interpolated in its logarithm; beyond the curve that of its end."""
        return float(np.interp(np.log(strength), np.log(self.strengths), self.score))

    def reaches(self, sdlogj: float) -> bool:
        """Whether this smoothness lies between those of the curve's ends."""
        return min(self.sdlogj) <= sdlogj <= max(self.sdlogj)


def best(curves: Sequence[Curve], sdlogj: float) -> tuple[int, float]:
    """Which curve has the highest score at this smoothness, and the strength there."""
    strengths = [curve.strength_at(sdlogj) for curve in curves]
    scores = [curve.score_at(strength) for curve, strength in zip(curves, strengths, strict=True)]
    place = int(np.argmax(scores))
    return place, strengths[place]
