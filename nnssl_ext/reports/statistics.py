"""Is one method better than another on the same cases? Paired difference, bootstrap interval, Wilcoxon, and a plain verdict."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import stats

Figures = Sequence[float] | Float[np.ndarray, " cases"]

CONFIDENCE = 0.95
RESAMPLES = 9999  # scipy's default
SMALLEST = 6
"""Pairs below which no verdict is given: with five, even differences of one sign have a two-sided Wilcoxon p of 2 / 2**5 =
0.0625, and a bootstrap interval of so few is too short."""


@dataclass(frozen=True)
class Comparison:
    """Paired differences, first minus second.

    Attributes:
        n: pairs that both have.
        difference: their mean.
        low, high: bootstrap interval of the mean (bias-corrected and accelerated); NaN for fewer than two pairs.
        p: two-sided Wilcoxon signed-rank test; 1 where nothing differs.
        higher_is_better: what the figures mean.
    """

    n: int
    difference: float
    low: float
    high: float
    p: float
    higher_is_better: bool = True

    @property
    def shown(self) -> int:
        """1: the first is better, -1: it is worse, 0: no difference is shown. The interval decides, given `SMALLEST` pairs."""
        if self.n < SMALLEST or not (self.low > 0 or self.high < 0):
            return 0
        return 1 if (self.low > 0) == self.higher_is_better else -1

    def verdict(self, better: str = "better", worse: str = "worse") -> str:
        """One phrase, e.g. ``better: +0.012 (0.004 to 0.020), p = 0.003, n = 29``."""
        word = {1: better, -1: worse, 0: "no difference shown"}[self.shown]
        if not self.n:
            return f"{word}: no pair in common"
        few = f", fewer than the {SMALLEST} that a verdict needs" if self.n < SMALLEST else ""
        interval = f" ({self.low:+.4f} to {self.high:+.4f})" if np.isfinite(self.low) else ""
        return f"{word}: {self.difference:+.4f}{interval}, p = {self.p:.2g}, n = {self.n}{few}"


def compare(first: Figures, second: Figures, higher_is_better: bool = True, seed: int = 0) -> Comparison:
    """Compare figures of the same cases in the same order. Pairs in which either is NaN are left out.

    Repetitions of a case (seeds of training) are to be averaged first: they are not independent cases.

    Args:
        first, second: equally many figures.
        seed: of the bootstrap.

    Raises:
        ValueError: unequal lengths.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} figures cannot be paired")
    differences = np.subtract(first, second, dtype=np.float64)
    differences = differences[np.isfinite(differences)]
    n = len(differences)
    if n < 2:
        return Comparison(n, float(differences.mean()) if n else np.nan, np.nan, np.nan, 1.0, higher_is_better)
    low, high = _interval(differences, seed)
    p = float(stats.wilcoxon(differences).pvalue) if differences.any() else 1.0
    return Comparison(n, float(differences.mean()), low, high, p, higher_is_better)


def _interval(values: np.ndarray, seed: int) -> tuple[float, float]:
    """Bootstrap interval of the mean; for values all alike, it is their value."""
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    rng = np.random.default_rng(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # answered below
        found = stats.bootstrap((values,), np.mean, n_resamples=RESAMPLES, confidence_level=CONFIDENCE, rng=rng)
        if not np.isfinite(found.confidence_interval).all():  # two or three values may leave nothing to correct by
            found = stats.bootstrap(
                (values,), np.mean, n_resamples=RESAMPLES, confidence_level=CONFIDENCE, rng=rng, method="percentile"
            )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)
