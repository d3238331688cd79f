"""Is one method better than another on the same cases? Paired difference, bootstrap interval, Wilcoxon, and a plain verdict."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float
from scipy import stats

Figures = Sequence[float] | Float[np.ndarray, " cases"]

CONFIDENCE = 0.95
RESAMPLES = 9999  # scipy's default
SMALLEST = 6
"""Pairs below which no verdict is given: with five, even differences of one sign have a two-sided Wilcoxon p of 2 / 2**5 =
0.0625, and a bootstrap interval of so few is too short."""


def finite(value: float) -> float | None:
    """None for NaN and infinities, which JSON does not have."""
    return float(value) if np.isfinite(value) else None


def spread(
    values: Float[np.ndarray, " cases"], centre: Literal["mean", "median"] = "mean"
) -> dict[str, float | int | None]:
    """`centre`, standard deviation ``sd`` (of a sample) and number ``n`` of the finite ones; ``mean`` None where there are none."""
    values = values[np.isfinite(values)]
    if not len(values):
        return {"mean": None, "sd": None, "n": 0}
    middle = np.median(values) if centre == "median" else values.mean()
    return {centre: float(middle), "sd": float(values.std(ddof=1)) if len(values) > 1 else None, "n": len(values)}


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


@dataclass(frozen=True)
class RunComparison:
    """Paired differences of trained networks, first minus second, over cases and over seeds of training.

    Two questions, two units. ``cases`` averages over seeds and resamples cases: would *these* networks differ on other cases?
    ``low`` and ``high`` let cases and seeds both vary, as reader studies do with cases and readers: would networks of other
    seeds (labelled subsets, initial weights) differ too? Few seeds make that interval wide, and rightly so.

    Attributes:
        cases: bootstrap and Wilcoxon over cases, seeds averaged.
        per_seed: mean difference of every seed.
        low, high: interval of the mean for other cases and other seeds; NaN for one seed.
    """

    cases: Comparison
    per_seed: tuple[float, ...]
    low: float
    high: float

    @property
    def shown(self) -> int:
        """1: the first is better, -1: worse, 0: no difference is shown. Both intervals must exclude zero; with a single seed
        the first alone decides, about these two runs."""
        if len(self.per_seed) < 2:
            return self.cases.shown
        return self.cases.shown if self.low > 0 or self.high < 0 else 0

    def verdict(self, better: str = "better", worse: str = "worse") -> str:
        """One phrase, e.g. ``helps: +0.078 (cases +0.060 to +0.096; cases and seeds ...), p = 1e-05, n = 40 cases x 3 seeds``."""
        word = {1: better, -1: worse, 0: "no difference shown"}[self.shown]
        if not self.cases.n:
            return f"{word}: no case in common"
        if self.shown and len(self.per_seed) == 1:
            word += " in these single runs"
        intervals = []
        if np.isfinite(self.cases.low):
            intervals.append(f"cases {self.cases.low:+.4f} to {self.cases.high:+.4f}")
        if np.isfinite(self.low):
            intervals.append(f"cases and seeds {self.low:+.4f} to {self.high:+.4f}")
        within = f" ({'; '.join(intervals)})" if intervals else ""
        few = f", fewer than the {SMALLEST} cases that a verdict needs" if self.cases.n < SMALLEST else ""
        n = f"{self.cases.n} cases x {len(self.per_seed)} seed{'s' if len(self.per_seed) > 1 else ''}"
        return f"{word}: {self.cases.difference:+.4f}{within}, p = {self.cases.p:.2g}, n = {n}{few}"


def compare_runs(
    first: Float[np.ndarray, "seeds cases"],
    second: Float[np.ndarray, "seeds cases"],
    higher_is_better: bool = True,
    seed: int = 0,
) -> RunComparison:
    """Compare runs that are paired in seeds and in cases. Cases that are NaN in any run are left out.

    Args:
        first, second: equally large tables; a row per seed of training.
        seed: of the bootstrap.

    Raises:
        ValueError: unequal shapes.
    """
    if first.shape != second.shape or first.ndim != 2:
        raise ValueError(f"tables of {first.shape} and {second.shape} figures cannot be paired")
    differences = np.subtract(first, second, dtype=np.float64)
    differences = differences[:, np.isfinite(differences).all(axis=0)]
    averaged = differences.mean(axis=0) if len(differences) else np.empty(0)
    over_cases = compare(averaged, np.zeros_like(averaged), higher_is_better, seed)
    per_seed = tuple(float(value) for value in differences.mean(axis=1)) if differences.size else ()
    low, high = crossed_interval(differences) if min(differences.shape) > 1 else (np.nan, np.nan)
    return RunComparison(over_cases, per_seed, low, high)


def crossed_interval(values: Float[np.ndarray, "seeds cases"]) -> tuple[float, float]:
    """Student's interval of the mean of a table whose rows and columns are both random.

    Two-way random effects without replication. With the mean squares R of rows, C of columns and E of the rest, the mean's
    variance is (R + C - E) / (rows x columns); where C < E, columns add nothing and it is R / (rows x columns). Degrees of
    freedom by Satterthwaite (Biometrics 2, 1946). Hillis (Statistics in Medicine 26, 2007) does so for readers and cases.
    A bootstrap over three seeds would be far too short: all three are on one side of zero by chance once in four times.
    """
    rows, columns = values.shape
    mean = values.mean()
    by_row, by_column = values.mean(axis=1) - mean, values.mean(axis=0) - mean
    rest = values - mean - by_row[:, None] - by_column
    freedom = np.array([rows - 1, columns - 1, (rows - 1) * (columns - 1)], dtype=np.float64)
    squares = np.array([columns * np.sum(by_row**2), rows * np.sum(by_column**2), np.sum(rest**2)]) / freedom
    signs = np.array([1.0, 1.0, -1.0] if squares[1] > squares[2] else [1.0, 0.0, 0.0])
    variance = float(signs @ squares)
    if variance <= 0:
        return float(mean), float(mean)
    degrees = variance**2 / float(np.sum((signs * squares) ** 2 / freedom))
    half = stats.t.ppf((1 + CONFIDENCE) / 2, degrees) * np.sqrt(variance / values.size)
    return float(mean - half), float(mean + half)
