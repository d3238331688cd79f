"""Lesion-wise detection: which connected components of the truth a segmentation found, and which it made up.

Components are 26-connected (scipy). Truth and prediction are matched one to one so that as many pairs as possible reach the least
IoU and, among such matchings, the summed IoU is largest (Hungarian algorithm). 0.1 is the IoU with which nnDetection (Baumgartner et
al., MICCAI 2021, arXiv:2106.00817) counts a lesion as found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

from nnssl_ext.errors import NnsslError

LEAST_IOU = 0.1
CONNECTIVITY = np.ones((3, 3, 3), dtype=int)

Spacing = tuple[float, float, float]


@dataclass(frozen=True)
class Lesion:
    """A connected component.

    Attributes:
        volume: mm^3.
        centre: centre of mass in mm along z, y, x from the centre of the first voxel.
        iou: with its partner of the other segmentation; 0 without one.
    """

    volume: float
    centre: tuple[float, float, float]
    iou: float = 0.0


@dataclass(frozen=True)
class Detection:
    """One case: its true and its predicted lesions, and the Dice of all their voxels (NaN where there are none in both)."""

    truth: tuple[Lesion, ...]
    predicted: tuple[Lesion, ...]
    dice: float

    @property
    def found(self) -> int:
        """True lesions with a partner; as many predicted ones have one."""
        return sum(lesion.iou > 0 for lesion in self.truth)

    @property
    def false_positives(self) -> int:
        return len(self.predicted) - self.found


def detect(
    truth: Bool[np.ndarray, "Z Y X"],
    predicted: Bool[np.ndarray, "Z Y X"],
    spacing: Spacing,
    least_volume: float = 0.0,
    least_iou: float = LEAST_IOU,
) -> Detection:
    """Match the lesions of one case.

    Args:
        truth, predicted: ``(Z, Y, X)``, True in lesions.
        spacing: mm along z, y, x.
        least_volume: mm^3; smaller components of either are left out, of the Dice too.
        least_iou: what makes a pair, above 0.

    Raises:
        NnsslError: an IoU out of range.
    """
    if not 0 < least_iou <= 1:
        raise NnsslError(f"an IoU of {least_iou} makes no pair", "choose one above 0 and at most 1")
    left, n_left = _components(truth, spacing, least_volume)
    right, n_right = _components(predicted, spacing, least_volume)
    iou = _iou(left, n_left, right, n_right)
    pairs = iou >= least_iou
    # a pair is worth more than any sum of IoUs, so first their number counts
    rows, columns = linear_sum_assignment(np.where(pairs, iou + min(iou.shape) + 1, 0), maximize=True)
    partner_left, partner_right = np.zeros(n_left), np.zeros(n_right)
    for row, column in zip(rows, columns, strict=True):
        if pairs[row, column]:
            partner_left[row] = partner_right[column] = iou[row, column]
    a, b = left > 0, right > 0
    voxels = int(a.sum() + b.sum())
    return Detection(
        _described(left, n_left, spacing, partner_left),
        _described(right, n_right, spacing, partner_right),
        2 * float((a & b).sum()) / voxels if voxels else float("nan"),
    )


def summarise_detection(cases: Sequence[Detection]) -> dict[str, Any]:
    """Figures over all cases: lesions and findings are pooled, Dice is the mean over cases that have it.

    Returns:
        cases, lesions, found, false_positives, sensitivity, precision, false_positives_per_case, dice; None where a figure
        has nothing to stand on.

    Raises:
        NnsslError: no case.
    """
    if not cases:
        raise NnsslError("there is no case to evaluate", "check the folders: names must agree")
    lesions, found = sum(len(case.truth) for case in cases), sum(case.found for case in cases)
    false = sum(case.false_positives for case in cases)
    dice = [case.dice for case in cases if np.isfinite(case.dice)]
    return {
        "cases": len(cases),
        "lesions": lesions,
        "found": found,
        "false_positives": false,
        "sensitivity": found / lesions if lesions else None,
        "precision": found / (found + false) if found + false else None,
        "false_positives_per_case": false / len(cases),
        "dice": float(np.mean(dice)) if dice else None,
    }


def _components(
    mask: Bool[np.ndarray, "Z Y X"], spacing: Spacing, least_volume: float
) -> tuple[Int[np.ndarray, "Z Y X"], int]:
    """Components numbered from 1, without those below the least volume."""
    labels, _ = ndimage.label(mask, CONNECTIVITY)
    sizes = np.bincount(labels.ravel()) * float(np.prod(spacing))
    kept = sizes >= least_volume
    kept[0] = False
    return (np.cumsum(kept) * kept)[labels], int(kept.sum())


def _iou(
    left: Int[np.ndarray, "Z Y X"], n_left: int, right: Int[np.ndarray, "Z Y X"], n_right: int
) -> Float[np.ndarray, "left right"]:
    """Of every component of one with every component of the other."""
    table = np.bincount(left.ravel() * (n_right + 1) + right.ravel(), minlength=(n_left + 1) * (n_right + 1))
    shared = table.reshape(n_left + 1, n_right + 1).astype(float)
    union = shared.sum(1, keepdims=True) + shared.sum(0, keepdims=True) - shared
    return shared[1:, 1:] / union[1:, 1:]


def _described(
    labels: Int[np.ndarray, "Z Y X"], count: int, spacing: Spacing, iou: Float[np.ndarray, " N"]
) -> tuple[Lesion, ...]:
    numbers = range(1, count + 1)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    centres = ndimage.center_of_mass(labels > 0, labels, list(numbers)) if count else []
    voxel = float(np.prod(spacing))
    return tuple(
        Lesion(
            float(sizes[number]) * voxel,
            (float(z) * spacing[0], float(y) * spacing[1], float(x) * spacing[2]),
            float(iou[number - 1]),
        )
        for number, (z, y, x) in zip(numbers, centres, strict=True)
    )
