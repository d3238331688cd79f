"""Figures that follow from the rows of a training log and show trends."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate

Row = Mapping[str, float | int]

WINDOW = 10
"""Rows over which a figure counts as moving or flat; our choice."""


def with_trends(rows: Sequence[Row]) -> list[dict[str, float]]:
    """The rows with further figures, each where what it needs was logged:

    - ``information``, ``patch_information``: entropy of the mean teacher output minus mean entropy of its outputs, over
      ln K. 0 when the output says nothing about the input, whether it is uniform or always the same prototype.
    - ``fastest_growth``: the highest ``weight_growth`` so far (norm of the weights after an epoch over that before it).
    - ``ibot_of_lowest``, ``patch_entropy_of_lowest``, ``rank_of_highest``: over the lowest and highest so far.
    - ``dino_range``, ``ibot_range``, ``teacher_temperature_range``: range of the last `WINDOW` rows over their mean.
    - ``predictor_effect``: what the predictor changes in the rank of projections; exactly 0 without one.
    - ``lowest_cosine``: smallest cosine between the gradients of two terms.
    - ``probe_gain``: linear probe over the random-initialisation line; ``probe_loss``: below its highest so far.
    """
    if not rows:
        return []
    columns = {
        name: [float(row.get(name, math.nan)) for row in rows] for name in dict.fromkeys(n for row in rows for n in row)
    }
    nothing = [math.nan] * len(rows)

    def column(name: str) -> list[float]:
        return columns.get(name, nothing)

    def highest(name: str) -> list[float]:
        return list(accumulate(column(name), lambda a, b: b if math.isnan(a) or b > a else a, initial=math.nan))[1:]

    def lowest(name: str) -> list[float]:
        return list(accumulate(column(name), lambda a, b: b if math.isnan(a) or b < a else a, initial=math.nan))[1:]

    def range_of(name: str) -> list[float]:
        recent = [column(name)[max(0, i - WINDOW + 1) : i + 1] for i in range(len(rows))]
        return [
            _ratio(max(r) - min(r), sum(r) / WINDOW) if len(r) == WINDOW and not any(map(math.isnan, r)) else math.nan
            for r in recent
        ]

    def over(values: Sequence[float], references: Sequence[float]) -> list[float]:
        return [_ratio(value, reference) for value, reference in zip(values, references, strict=True)]

    def minus(values: Sequence[float], others: Sequence[float]) -> list[float]:
        return [value - other for value, other in zip(values, others, strict=True)]

    cosines = [[v for name, v in row.items() if name.startswith("grad_cosine_")] for row in rows]
    trends = {
        "information": minus(column("prototypes_entropy"), column("teacher_entropy")),
        "patch_information": minus(column("patch_prototypes_entropy"), column("patch_entropy")),
        "fastest_growth": highest("weight_growth"),
        "ibot_of_lowest": over(column("ibot"), lowest("ibot")),
        "patch_entropy_of_lowest": over(column("patch_entropy"), lowest("patch_entropy")),
        "rank_of_highest": over(column("effective_rank"), highest("effective_rank")),
        "predictor_effect": [abs(value) for value in minus(column("projector_rank"), column("predictor_rank"))],
        "dino_range": range_of("dino"),
        "ibot_range": range_of("ibot"),
        "teacher_temperature_range": range_of("teacher_temperature"),
        "lowest_cosine": [min(values, default=math.nan) for values in cosines],
        "probe_gain": minus(column("probe_dice"), column("probe_dice_random")),
        "probe_loss": minus(highest("probe_dice"), column("probe_dice")),
    }
    everything = {**columns, **trends}
    return [
        {name: values[i] for name, values in everything.items() if not math.isnan(values[i])} for i in range(len(rows))
    ]


def _ratio(value: float, reference: float) -> float:
    return value / reference if reference > 0 else math.nan
