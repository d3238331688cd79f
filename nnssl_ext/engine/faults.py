"""Non-finite steps: skipped and counted with their cases, within a budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from nnssl_ext.data.loader import RegionBatch
from nnssl_ext.errors import NnsslError


class Faults:
    """The non-finite steps since the last checkpoint.

    Args:
        budget: how many are tolerated.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.steps: list[int] = []
        self.cases: Counter[str] = Counter()
        self.bad_input: set[str] = set()

    def note(self, step: int, batches: Sequence[RegionBatch]) -> str:
        """Record a skipped step with the cases of this process; returns a line for the log."""
        self.steps.append(step)
        names = [name for batch in batches for name in batch.cases]
        self.cases.update(names)
        for batch in batches:
            finite = torch.isfinite(batch.voxels).flatten(1).all(1)
            self.bad_input.update(name for name, good in zip(batch.cases, finite.tolist(), strict=True) if not good)
        return f"step {step}: gradient not finite, step skipped (cases {', '.join(names)})"

    @property
    def spent(self) -> bool:
        """Whether the budget is exceeded."""
        return len(self.steps) > self.budget

    def forget(self) -> None:
        """Start counting anew, after a checkpoint or a roll-back."""
        self.steps.clear()
        self.cases.clear()
        self.bad_input.clear()

    def of_all(self, processes: int) -> Faults:
        """With the cases of all processes, each of which must ask."""
        if processes == 1:
            return self
        everyone: list[tuple[Counter[str], set[str]]] = [(Counter(), set())] * processes
        torch.distributed.all_gather_object(everyone, (self.cases, self.bad_input))
        together = Faults(self.budget)
        together.steps = list(self.steps)
        for cases, bad in everyone:
            together.cases.update(cases)
            together.bad_input.update(bad)
        return together

    def diagnosis(self, lr: float, precision: str) -> NnsslError:
        """What the skipped steps have in common, and what to do."""
        what = (
            f"{len(self.steps)} steps with non-finite gradients ({self.steps[0]} to {self.steps[-1]}), twice in a row"
        )
        if self.bad_input:
            return NnsslError(
                f"{what}: the preprocessed images of {', '.join(sorted(self.bad_input))} hold NaN or Inf",
                "repair or exclude these cases (--cases), then preprocess again",
            )
        often = ", ".join(f"{name} ({count})" for name, count in self.cases.most_common(3))
        return NnsslError(
            f"{what}; the images are finite; most frequent cases: {often}",
            f"lower --optim.lr (now {lr:g})" + (" or use --precision 32" if precision != "32" else ""),
        )
