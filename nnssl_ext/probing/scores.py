"""How good a segmentation of one case is: nnU-Net's Dice, and the distance of the surfaces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
from jaxtyping import Integer

from nnssl_ext.probing.cases import Labels
from nnssl_ext.registration.measures import hd95

Scores = dict[str, dict[str, float]]
"""Name of a class -> figure -> value."""


class _InMemory:
    """Stands for nnU-Net's readers of files."""

    def __init__(self, volumes: Mapping[str, np.ndarray]) -> None:
        self.volumes = volumes

    def read_seg(self, name: str) -> tuple[np.ndarray, dict[str, Any]]:
        return self.volumes[name], {}


def score(
    truth: Integer[np.ndarray, "Z Y X"],
    answer: Integer[np.ndarray, "Z Y X"],
    labels: Labels,
    spacing: tuple[float, float, float],
) -> Scores:
    """``dice`` of each class by nnU-Net's ``compute_metrics``, and ``hd95_mm``.

    Both are NaN for a class that neither volume has. Where only one has it, the distance is the volume's diagonal, which is
    what the BraTS challenge does, so that a class that is never found is not left out.
    """
    from nnunetv2.evaluation.evaluate_predictions import compute_metrics, region_or_label_to_mask

    reader = cast(Any, _InMemory({"truth": truth, "answer": answer}))
    scored = list(labels.scored.values())
    metrics = compute_metrics("truth", "answer", reader, cast(Any, scored), cast(Any, labels.ignore))["metrics"]
    counted = truth != labels.ignore if labels.ignore is not None else np.ones(truth.shape, bool)
    diagonal = float(np.linalg.norm(np.multiply(truth.shape, spacing)))
    found: Scores = {}
    for name, value in labels.scored.items():
        a, b = ((region_or_label_to_mask(volume, value) & counted).astype(np.uint8) for volume in (truth, answer))
        one_sided = bool(a.any()) != bool(b.any())
        distance = diagonal if one_sided else hd95(a, b, spacing, [1])[1]
        found[name] = {"dice": float(metrics[value]["Dice"]), "hd95_mm": distance}
    return found
