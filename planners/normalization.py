"""Which normalisation a channel gets and why, and the one scheme that nnU-Net lacks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Real
from nnunetv2.preprocessing.normalization.default_normalization_schemes import ImageNormalization
from nnunetv2.preprocessing.normalization.map_channel_name_to_normalization import (
    channel_name_to_normalization_mapping,
    get_normalization_scheme,
)

from nnssl_ext.data.foreground import foreground_mask
from nnssl_ext.errors import NnsslError

PERCENTILES = (0.5, 99.5)
"""Clipping bounds, nnU-Net's own for CT."""

HEAVY_TAIL = 1.0
"""A case has heavy tails if its extreme voxels lie further beyond the percentiles than those lie apart.

Measured tail reach (`tail_reach`): normal noise 0.4-0.6, Rayleigh noise and a small MR 0.2-0.9, 58 % of 200 hippocampus
crops above 1 (median 1.1, maximum 3.3).
"""

HEAVY_SHARE = 0.25
"""Share of heavy-tailed cases from which on a channel is clipped (our choice)."""


def tail_reach(values: Real[np.ndarray, " N"]) -> float:
    """How far the extreme values lie beyond the 0.5 and 99.5 percentiles, in units of the distance between those.

    0 for constant values or if the percentiles coincide with the extremes; infinite if they coincide with each other.
    """
    low, high = np.percentile(values, PERCENTILES)
    beyond = max(float(values.max() - high), float(low - values.min()))
    if beyond == 0:
        return 0.0
    return beyond / float(high - low) if high > low else float("inf")


def choose_normalization(channel: str, reaches: Sequence[float]) -> tuple[str, str]:
    """The class name of a channel's normalisation, and one sentence saying why.

    Args:
        channel: the channel's name in ``dataset.json``. nnU-Net's special names (CT, noNorm, zscore, rescale_to_0_1,
            rgb_to_0_1) mean what they mean to nnU-Net.
        reaches: `tail_reach` of this channel's foreground, one per case.
    """
    if channel.casefold() in channel_name_to_normalization_mapping:
        scheme = get_normalization_scheme(channel).__name__
        return scheme, f"nnU-Net's scheme for channels named {channel}"
    heavy = float(np.mean(np.asarray(reaches) > HEAVY_TAIL))
    told = (
        f"in {heavy:.0%} of the cases the extreme foreground voxels reach further beyond the "
        f"{PERCENTILES[0]}-{PERCENTILES[1]} percentiles than these lie apart"
    )
    if heavy >= HEAVY_SHARE:
        return nnsslPercentileNormalization.__name__, f"clipped to percentiles before scaling: heavy tails, {told}"
    return "ZScoreNormalization", f"z-score per case: light tails, {told}"


class nnsslPercentileNormalization(ImageNormalization):
    """Clip to the 0.5 and 99.5 percentiles of the case's foreground, then scale that foreground to mean 0 and std 1.

    Foreground is nnU-Net's nonzero mask if `use_mask_for_norm` is set (what lies outside stays 0), else what
    `foreground_mask` finds. Labels are not used, so training and inference agree. Voxels that are not finite count as the
    lower bound; a constant foreground gives zeros.
    """

    leaves_pixels_outside_mask_at_zero_if_use_mask_for_norm_is_true = True

    def run(self, image: Real[np.ndarray, "Z Y X"], seg: np.ndarray | None = None) -> Float[np.ndarray, "Z Y X"]:
        """Normalise one channel.

        Args:
            image: ``(Z, Y, X)`` raw intensities of one channel.
            seg: nnU-Net's map of the same shape, negative outside the nonzero region; read only if `use_mask_for_norm`.

        Returns:
            ``(Z, Y, X)`` in ``target_dtype``.
        """
        finite = np.isfinite(image)
        image = np.where(finite, image, image[finite].min() if finite.any() else 0).astype(np.float32)
        masked = self.use_mask_for_norm and seg is not None
        inside = np.asarray(seg) >= 0 if masked else _foreground(image)
        values = image[inside & finite].astype(np.float64)
        if values.size == 0:
            return np.zeros(image.shape, self.target_dtype)
        low, high = np.percentile(values, PERCENTILES)
        clipped = values.clip(low, high)
        spread = max(float(clipped.std()), 1e-8)
        scaled = (image.clip(low, high) - clipped.mean()) / spread
        if masked:
            scaled[~inside] = 0
        return scaled.astype(self.target_dtype)


def _foreground(image: Float[np.ndarray, "Z Y X"]) -> Bool[np.ndarray, "Z Y X"]:
    try:
        return foreground_mask(image)
    except NnsslError:  # a constant image: nothing to tell apart
        return np.ones(image.shape, dtype=bool)
