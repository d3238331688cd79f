"""Real hippocampi with their true labels as features: the finer the features, the better the registration."""

import nibabel
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from nnssl_ext.registration.measures import dice
from nnssl_ext.registration.smoothness import smoothness
from nnssl_ext.registration.solver import SolverSettings, register_features
from nnssl_ext.registration.warp import warp

SIZE = (48, 64, 48)
LABELS = (1, 2)


@pytest.mark.slow
def test_resolution_of_perfect_features_limits_the_overlap(test_data):
    """Over 29 pairs, the convexAdam package reaches 0.915, 0.901 and 0.868 at strides 1, 2 and 4 (reference protocol)."""
    cases = sorted((test_data / "Task04_Hippocampus" / "labelsTr").glob("hippocampus_*.nii.gz"))[-30:]
    settings = SolverSettings(coarse_mm=3.0, search_mm=9.0)
    scores: dict[int, list[float]] = {stride: [] for stride in (0, 1, 2, 4)}
    for fixed_file, moving_file in ((cases[0], cases[1]), (cases[10], cases[11]), (cases[20], cases[21])):
        fixed, moving = padded(fixed_file), padded(moving_file)
        for stride, reached in scores.items():
            field = torch.zeros(3, *SIZE)
            if stride:
                maps = [one_hot(labels, stride) for labels in (fixed, moving)]
                field = register_features(*maps, (1.0, 1.0, 1.0), settings).displacement_voxels
                assert smoothness(field).fold_percent < 0.1
            warped = warp(torch.from_numpy(moving)[None].float(), field, "nearest")[0].numpy().astype(int)
            reached.append(float(np.mean(list(dice(fixed, warped, LABELS).values()))))
    means = {stride: float(np.mean(values)) for stride, values in scores.items()}
    assert means[1] > means[2] > means[4] > means[0] + 0.1
    assert means[1] > 0.88


def padded(file):
    labels = np.asarray(nibabel.load(file).dataobj).astype(int)
    margins = [size - length for size, length in zip(SIZE, labels.shape, strict=True)]
    return np.pad(labels, [(margin // 2, margin - margin // 2) for margin in margins])


def one_hot(labels, stride):
    maps = torch.stack([torch.from_numpy(labels == label).float() for label in (0, *LABELS)])
    pooled = F.avg_pool3d(maps[None], stride)
    return F.interpolate(pooled, size=SIZE, mode="trilinear", align_corners=False)[0]
