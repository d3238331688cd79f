"""How good a registration is: overlap of labels, distance of their surfaces."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Integer
from scipy import ndimage

Labels = Integer[np.ndarray, "Z Y X"]
Spacing = Sequence[float]


def dice(fixed: Labels, warped: Labels, labels: Sequence[int]) -> dict[int, float]:
    """``2 |A and B| / (|A| + |B|)`` per label; NaN for a label that neither volume has."""
    scores = {}
    for label in labels:
        a, b = fixed == label, warped == label
        total = int(a.sum()) + int(b.sum())
        scores[label] = 2 * int((a & b).sum()) / total if total else float("nan")
    return scores


def hd95(fixed: Labels, warped: Labels, spacing: Spacing, labels: Sequence[int]) -> dict[int, float]:
    """95th percentile, in mm, of the distances from each surface voxel of either volume to the other's surface, pooled.

    Surface voxels have a face neighbour outside of the label (or of the volume). NaN for a label that a volume lacks.
    """
    distances = {}
    for label in labels:
        a, b = fixed == label, warped == label
        if not (a.any() and b.any()):
            distances[label] = float("nan")
            continue
        box = ndimage.find_objects((a | b).astype(np.uint8))[0]
        a, b = _surface(a[box]), _surface(b[box])
        both = np.concatenate([_distance_to(b, spacing)[a], _distance_to(a, spacing)[b]])
        distances[label] = float(np.percentile(both, 95))
    return distances


def _surface(mask: np.ndarray) -> np.ndarray:
    return mask & ~ndimage.binary_erosion(mask)


def _distance_to(surface: np.ndarray, spacing: Spacing) -> np.ndarray:
    return ndimage.distance_transform_edt(~surface, sampling=spacing)
