"""Published augmentations, translated to ours. Additive strengths are multiplied by `UNITS`."""

from __future__ import annotations

from dataclasses import replace

from nnssl_ext.views.policies import IntensitySettings, SpatialSettings

UNITS = 5.0
"""Standard deviations between black and white. The papers' images lie in [0, 1], ours are z-scored; over 60 hippocampus MR
the range is 9 (4.7 to 14) standard deviations wide, that of an abdominal CT window of [-500, 500] HU 4 to 11."""

NO_INTENSITY = IntensitySettings(
    noise=0.0, blur=0.0, brightness=0.0, contrast=0.0, low_resolution=0.0, gamma_inverted=0.0, gamma=0.0
)

STILL = SpatialSettings(flip=(0.0, 0.0, 0.0), rotation=0.0, zoom=0.0)
"""Random places only. For cases that all show one organ the same way round, too: its orientation is not what tells them apart."""

SIMSIAM_SPATIAL = SpatialSettings(
    flip=(0.5, 0.5, 0.5), rot90=(0.5, 0.5, 0.5), rotation=0.0, zoom=0.75, zoom_range=(0.8, 1.2)
)
"""IoU-cropped SimSiam (AGH thesis, 2023); its flips and turns in the slice, here about every axis."""

SIMSIAM_INTENSITY = replace(
    NO_INTENSITY,
    brightness=0.75,
    brightness_range=(0.9, 1.1),
    shift=0.75,
    shift_range=(-0.1 * UNITS, 0.1 * UNITS),
    blur=0.25,
    blur_sigma=(0.25, 1.5),
    noise=0.25,
    noise_std=(0.01 * UNITS, 0.01 * UNITS),
)
"""IoU-cropped SimSiam (AGH thesis, 2023)."""

DINO_SPATIAL = SpatialSettings(flip=(0.3, 0.3, 0.3), rot90=(0.3, 0.3, 0.3), rotation=0.0, zoom=0.0)
"""3DINO (arXiv:2501.11755)."""

_DINO = replace(
    NO_INTENSITY,
    power_law=0.27,
    noise=0.27,
    noise_std=(0.001 * UNITS, 0.001 * UNITS),
    histogram_shift=0.27,
    blur_sigma=(0.5, 1.0),
)

DINO_INTENSITY = (replace(_DINO, filter=1.0), replace(_DINO, filter=0.1, gibbs=0.2), replace(_DINO, filter=0.5))
"""3DINO's for the first global, the second global and the local views: one of gamma, noise and histogram shift with p 0.8
(here each with p 0.27), either smoothing or sharpening with p 1, 0.1 and 0.5, ringing with p 0.2 on the second. Its noise of 0.002
is on images in [-1, 1]."""

DINO_MILD_INTENSITY = tuple(replace(recipe, power_law=0.0, histogram_shift=0.0, gibbs=0.0) for recipe in DINO_INTENSITY)
"""3DINO's without what changes a case's contrast, for cases that differ by little else (ours)."""

REGISTRATION_SPATIAL = SpatialSettings(
    flip=(0.0, 0.0, 0.0), rotation=1.0, degrees=10.0, zoom=1.0, zoom_range=(0.87, 1.15)
)
"""How far scans are apart after a coarse alignment: hippocampi before any differ by 2.4 voxels on average (measured)."""

REGISTRATION_INTENSITY = replace(
    NO_INTENSITY,
    random_convolutions=0.5,
    histogram_shift=0.3,
    bias_field=0.3,
    noise=0.3,
    noise_std=(0.0, 0.15),
    blur=0.2,
    blur_sigma=(0.5, 1.0),
    gamma=0.3,
    gamma_range=(0.7, 1.5),
)
"""Another scanner, or another modality: GIN (arXiv:2111.12525) on every second view; the other probabilities are ours."""
