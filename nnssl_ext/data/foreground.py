"""Where the patient is, found without labels: the voxels that are neither padding nor air."""

from __future__ import annotations

import numpy as np
import SimpleITK as sitk
from jaxtyping import Bool, Float, Real
from scipy import ndimage

from nnssl_ext.errors import NnsslError

# Air is dark and alike: the middle half of the voxels below the threshold spans less than this part of the distance
# between the medians below and above it. Measured: 0.09-0.21 where there is air (CT, chest phantom, abdominal MR), 0.30-1.3
# in crops that hold tissue only (hippocampus, centres of CT and MR), where nothing must be cut away.
COMPACT = 0.25
# Tissue in the shade of a coil is dark too. It is told from air by at least this part of that distance, and by this many
# standard deviations of air.
ABOVE_AIR, DEVIATIONS = 0.2, 5.0
PADDING_SHARE = 0.01  # a lowest value this frequent, reaching the border, is padding and not measured
COMPONENT_SHARE = 0.05  # pieces smaller than this part of the largest are table, noise or ghosts
AERATED = -400.0  # HU; between aerated lung (about -850) and soft tissue (about 50), a usual threshold for lungs
SAMPLE = 1_000_000  # voxels for the histogram; more change thresholds by less than one of its 256 bins


def foreground_mask(image: Real[np.ndarray, "Z Y X"]) -> Bool[np.ndarray, "Z Y X"]:
    """Foreground of one raw CT or MR channel: smoothed, thresholded, largest pieces kept, holes (lungs) filled.

    Air is what lies below Otsu's, else the (lower) triangle threshold, if those voxels are alike; air's own median and
    spread then give the threshold.
    With neither the image holds no air, and all but padding is foreground. Only contrast counts, so any intensity
    range and unit will do.

    Args:
        image: ``(Z, Y, X)`` raw intensities, foreground brighter than air.

    Returns:
        ``(Z, Y, X)``, True in the foreground; never empty.

    Raises:
        NnsslError: nothing to tell apart: the image is constant, or has NaN or infinite voxels.
    """
    if not np.isfinite(image).all():
        raise NnsslError(
            "no label-free foreground: the image has NaN or infinite voxels", "repair or leave out the image"
        )
    if image.min() == image.max():
        raise NnsslError(
            f"no label-free foreground: all voxels equal {image.flat[0]}", "leave out the image or give a label for it"
        )
    inside = ~_padding(image)
    smooth = _smooth(image, inside)
    threshold = air_threshold(smooth[inside])
    found = inside if threshold is None else _tidy(inside & (smooth > threshold))
    return found if found.any() else inside


def lung_mask(image: Real[np.ndarray, "Z Y X"]) -> Bool[np.ndarray, "Z Y X"]:
    """Aerated lung of a chest CT: what is darker than `AERATED` inside the body, small pieces dropped.

    Vessels, solid lesions and consolidation are not in it; gas in the bowel may be.

    Args:
        image: ``(Z, Y, X)`` Hounsfield units.

    Returns:
        ``(Z, Y, X)``, True in the lungs; never empty.

    Raises:
        NnsslError: no air inside a body: not a chest, or not Hounsfield units.
    """
    inside = foreground_mask(image) & (ndimage.gaussian_filter(image.astype(np.float32), 1.0) < AERATED)
    found = _large_pieces(ndimage.binary_opening(inside))
    if not found.any():
        raise NnsslError(
            f"no lungs: nothing inside the body is below {AERATED:g} HU", "use CT of the chest in Hounsfield units"
        )
    return found


def _padding(image: Real[np.ndarray, "Z Y X"]) -> Bool[np.ndarray, "Z Y X"]:
    """Border-connected voxels of exactly the lowest value, if frequent: scanner circles, skull-stripping, resampling."""
    lowest = image == image.min()
    if lowest.mean() < PADDING_SHARE:
        return np.zeros(image.shape, dtype=bool)
    padding = lowest & ~_filled(~lowest, (0, 1, 2))
    return padding if padding.mean() >= PADDING_SHARE else np.zeros(image.shape, dtype=bool)


def _smooth(image: Real[np.ndarray, "Z Y X"], inside: Bool[np.ndarray, "Z Y X"]) -> Float[np.ndarray, "Z Y X"]:
    """Outliers clipped (percentiles 0.5 and 99 of what is not padding), scaled to 0..1, noise averaged (1 voxel)."""
    low, high = (float(bound) for bound in np.percentile(image[inside], [0.5, 99]))
    if low == high:
        low, high = float(image[inside].min()), float(image[inside].max())
    span = high - low or 1.0
    scaled = image.astype(np.float32)
    scaled[~inside] = low
    np.clip(scaled, low, high, out=scaled)
    scaled -= low
    scaled /= span
    return ndimage.gaussian_filter(scaled, 1.0)


def air_threshold(values: Float[np.ndarray, " N"]) -> float | None:
    """Where air ends, or None where no air is among the values: the first standard threshold with a compact dark class, or less.

    Args:
        values: intensities of any unit, without padding; noise should have been averaged.
    """
    values = values[:: max(1, values.size // SAMPLE)]
    histogram = sitk.GetImageFromArray(values.reshape(1, 1, -1))
    for method in (sitk.OtsuThresholdImageFilter(), sitk.TriangleThresholdImageFilter()):
        method.SetNumberOfHistogramBins(256)
        method.Execute(histogram)
        threshold = float(method.GetThreshold())
        dark, bright = values[values <= threshold], values[values > threshold]
        if dark.size and bright.size:
            first, third = np.percentile(dark, [25, 75])
            if third - first < COMPACT * (np.median(bright) - np.median(dark)):
                return min(threshold, _top_of_air(dark, float(np.median(bright))))
    return None


def _top_of_air(dark: Float[np.ndarray, " N"], bright: float) -> float:
    """Where air ends, by its own median and spread (1.4826 median absolute deviations are one of a Gaussian)."""
    air = float(np.median(dark))
    deviation = 1.4826 * float(np.median(np.abs(dark - air)))
    return air + max(ABOVE_AIR * (bright - air), DEVIATIONS * deviation)


def _tidy(mask: Bool[np.ndarray, "Z Y X"]) -> Bool[np.ndarray, "Z Y X"]:
    """Detach thin bridges, drop small pieces, fill what is enclosed in space or in any slice (lungs open at the top)."""
    opened = mask & ndimage.binary_dilation(ndimage.binary_erosion(mask, border_value=1))
    tidy = _large_pieces(opened if opened.any() else mask)
    for axis in range(3):
        tidy = _filled(tidy, tuple({0, 1, 2} - {axis}))
    return tidy


def _large_pieces(mask: Bool[np.ndarray, "Z Y X"]) -> Bool[np.ndarray, "Z Y X"]:
    """Without the pieces smaller than `COMPONENT_SHARE` of the largest; an empty mask stays as it is."""
    labels, count = ndimage.label(mask)
    if not count:
        return mask
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return (sizes >= COMPONENT_SHARE * sizes.max())[labels]


def _filled(mask: Bool[np.ndarray, "Z Y X"], axes: tuple[int, ...]) -> Bool[np.ndarray, "Z Y X"]:
    """The mask and all that it encloses: background that reaches no end of the volume by steps along `axes`."""
    steps = ndimage.generate_binary_structure(3, 1)
    for axis in {0, 1, 2} - set(axes):
        np.moveaxis(steps, axis, 0)[[0, 2]] = False
    labels, count = ndimage.label(~mask, steps)
    enclosed = np.ones(count + 1, dtype=bool)
    for axis in axes:
        enclosed[np.unique(labels.take([0, -1], axis))] = False
    return mask | enclosed[labels]
