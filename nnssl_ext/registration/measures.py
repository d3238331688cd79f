"""How good a registration is: overlap of labels, distance of their surfaces, distance of landmarks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Integer
from scipy import ndimage
from torch import Tensor

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


def target_registration_error(
    fixed_points: Float[np.ndarray, "N 3"],
    moving_points: Float[np.ndarray, "N 3"],
    displacement_voxels: Float[Tensor, "3 Z Y X"],
    spacing: Spacing,
) -> Float[np.ndarray, " N"]:
    """Distance in mm between where the field takes each fixed landmark and the moving landmark.

    Args:
        fixed_points, moving_points: voxel coordinates z, y, x on the fixed grid, not necessarily whole. Between voxels the
            field is linear; beyond the grid it is that of the nearest face.
    """
    field = displacement_voxels.detach().cpu().numpy()
    moved = np.stack([ndimage.map_coordinates(part, fixed_points.T, order=1, mode="nearest") for part in field], axis=1)
    return np.linalg.norm((fixed_points + moved - moving_points) * np.asarray(spacing), axis=1)


def _surface(mask: np.ndarray) -> np.ndarray:
    return mask & ~ndimage.binary_erosion(mask)


def _distance_to(surface: np.ndarray, spacing: Spacing) -> np.ndarray:
    return ndimage.distance_transform_edt(~surface, sampling=spacing)
