"""Intensity augmentations of the dense contrastive methods, whose strengths follow the scale of a case."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nnssl_ext.data.intensity_scale import IntensityScale
from nnssl_ext.views.local_corruptions import CUBOIDS

LOWEST, HIGHEST = -1350.0, 1000.0
"""HU between which vox2vec draws its windows; its strengths are taken as shares of this range."""
SHUFFLED = 5000 * (6 * 6 * 1) / (128 * 128 * 32)
"""Share of the voxels in the 5,000 shuffled blocks of arXiv:2401.06473's patch."""


@dataclass(frozen=True)
class WindowIntensity:
    """vox2vec's (released code), for each crop. On other scans than CT the window lies between the case's percentiles instead of
    between -1350 and 1000 HU, noise and windows are the same shares of it, and a Bezier curve stands in for the different
    meaning of a window there (our choice). The window is on the scale of the first channel and leaves other channels as they are;
    filter, noise and curve are for all channels.

    Attributes:
        filter: probability of a filter inside slices along z: one half blurs, the other sharpens.
        blur_sigma: voxels.
        sharpen_sigma, sharpen_amount: voxels of the blur before, and strength.
        noise, noise_hu: probability, and standard deviation.
        window, window_low_hu, window_high_hu: probability of a random window, and ranges of its ends.
    """

    filter: float = 0.5
    blur_sigma: tuple[float, float] = (0.25, 1.5)
    sharpen_sigma: tuple[float, float] = (0.5, 1.0)
    sharpen_amount: tuple[float, float] = (10.0, 30.0)
    noise: float = 0.5
    noise_hu: tuple[float, float] = (0.0, 30.0)
    window: float = 0.8
    window_low_hu: tuple[float, float] = (-1350.0, -1000.0)
    window_high_hu: tuple[float, float] = (300.0, 1000.0)

    def draw(self, scale: IntensityScale, rng: np.random.Generator) -> dict[str, float]:
        """Filter, noise, and the window: clipping, then stretching to where the whole range was."""
        drawn: dict[str, float] = {}
        unit = (scale.white - scale.black) / (HIGHEST - LOWEST)  # normalised intensity per HU
        if rng.random() < self.filter:
            if rng.random() < 0.5:
                drawn["axial_blur"] = rng.uniform(*self.blur_sigma)
            else:
                drawn["axial_blur"] = rng.uniform(*self.sharpen_sigma)
                drawn["axial_sharpen"] = rng.uniform(*self.sharpen_amount)
        if rng.random() < self.noise:
            drawn |= {"noise": rng.uniform(*self.noise_hu) * unit, "noise_seed": float(rng.integers(2**31))}
        low, high = LOWEST, HIGHEST
        windowed = rng.random() < self.window
        if windowed:
            low, high = rng.uniform(*self.window_low_hu), rng.uniform(*self.window_high_hu)
        drawn["floor"], drawn["ceiling"] = (scale.black + (end - LOWEST) * unit for end in (low, high))
        if windowed:
            stretch = (HIGHEST - LOWEST) / (high - low)
            drawn |= {"window_gain": stretch, "window_shift": scale.black - stretch * drawn["floor"]}
            if not scale.hounsfield:
                drawn |= {"bezier": 1.0, "bezier_seed": float(rng.integers(2**31))}
        return drawn


@dataclass(frozen=True)
class LocalIntensity:
    """Those of arXiv:2401.06473, for each crop; see `nnssl_ext.views.local_corruptions`.

    Attributes:
        shuffle, shuffled: probability of shuffling blocks, and share of the blocks that are.
        bezier: probability of a tone curve.
        inpaint: noise cuboids are added as long as a draw stays below this probability, at most 30.
    """

    shuffle: float = 0.8
    shuffled: float = SHUFFLED
    bezier: float = 0.9
    inpaint: float = 0.95

    def draw(self, scale: IntensityScale, rng: np.random.Generator) -> dict[str, float]:
        """What is applied, in this order."""
        drawn: dict[str, float] = {}
        if rng.random() < self.shuffle:
            drawn |= {"shuffle": self.shuffled, "shuffle_seed": float(rng.integers(2**31))}
        if rng.random() < self.bezier:
            drawn |= {"bezier": 1.0, "bezier_seed": float(rng.integers(2**31))}
        kept = rng.random(CUBOIDS) < self.inpaint
        count = int(kept.cumprod().sum())
        if count:
            drawn |= {"inpaint": float(count), "inpaint_seed": float(rng.integers(2**31))}
        return drawn
