"""Token, patch and crop sizes from spacing and median shape. Pure functions; axes z, y, x; sizes in voxels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from nnssl_ext.records import Size

FEW_TOKENS = 512
"""Below 8 tokens per axis a 75 % mask leaves fewer than 128 tokens to learn from: use finer tokens (our choice)."""

FINE_TOKEN = 4
"""The finer token, as used for small structures and registration features (DINO variants in 3D)."""

INITIAL_PATCH_VOXELS = 256**3
"""nnU-Net starts from the spacing's aspect ratio at this volume and shrinks until the patch fits."""


def token_size(spacing: Sequence[int | float], median_shape: Sequence[int | float], edge: int) -> tuple[Size, str]:
    """Voxels per token, near-isotropic in mm: `edge` voxels where spacing is finest, fewer (powers of 2) elsewhere.

    Args:
        spacing: target mm per voxel.
        median_shape: voxels of the median case at that spacing.
        edge: voxels along the finest axis, a power of 2; 4 is taken instead if the median case has too few tokens.

    Returns:
        The token, and one sentence saying why.
    """
    token = _isotropic(spacing, edge)
    count = math.prod(_tokens(median_shape, token))
    reason = f"{edge} voxels along the finest axis"
    if count < FEW_TOKENS and edge > FINE_TOKEN:
        token = _isotropic(spacing, FINE_TOKEN)
        reason = (
            f"{FINE_TOKEN} voxels along the finest axis, because tokens of {edge} would give the median case only "
            f"{count} tokens (fewer than {FEW_TOKENS})"
        )
    if len(set(token)) > 1:
        reason += "; fewer along coarser axes, so that a token is near-isotropic in mm"
    return token, reason


def token_strides(token: Sequence[int]) -> list[list[int]]:
    """U-Net-like strides, the first all ones, whose product is the token; coarse axes are halved last (deepest)."""
    stages = int(math.log2(max(token)))
    return [[1, 1, 1]] + [[2 if t >= 2 ** (stages - s) else 1 for t in token] for s in range(stages)]


def initial_patch(spacing: Sequence[int | float], median_shape: Sequence[int | float], divisor: Sequence[int]) -> Size:
    """nnU-Net's starting patch: isotropic in mm, no longer than the median case, rounded up to multiples of `divisor`."""
    scale = (INITIAL_PATCH_VOXELS * math.prod(spacing)) ** (1 / 3)
    wanted = [min(round(scale / s), round(m)) for s, m in zip(spacing, median_shape, strict=True)]
    return round_up(wanted, divisor)


def shrink(
    patch: Size, median_shape: Sequence[int | float], divisor: Sequence[int], fits: Callable[[Size], bool]
) -> Size:
    """Shorten, one divisor at a time, the axis that is longest relative to the median case until the patch fits.

    Stops at two divisors per axis: smaller patches see next to nothing.
    """
    while not fits(patch):
        open_axes = [axis for axis in range(3) if patch[axis] > 2 * divisor[axis]]
        if not open_axes:
            break
        longest = max(open_axes, key=lambda axis: patch[axis] / median_shape[axis])
        z, y, x = (edge - divisor[axis] * (axis == longest) for axis, edge in enumerate(patch))
        patch = (z, y, x)
    return patch


def local_crop(global_crop: Sequence[int], divisor: Sequence[int]) -> Size:
    """Half the global crop per axis (DINOv2 in 3D: 96 and 48 voxels), rounded up to multiples of `divisor`; two of it along the
    longest axis where that leaves one place or token, which cannot be normalised."""
    half = round_up([edge / 2 for edge in global_crop], divisor)
    if half != tuple(divisor):
        return half
    longest = max(range(3), key=lambda axis: global_crop[axis] / divisor[axis])
    z, y, x = (
        min(2 * d, g) if axis == longest else d for axis, (d, g) in enumerate(zip(divisor, global_crop, strict=True))
    )
    return z, y, x


def round_up(size: Sequence[int | float], divisor: Sequence[int]) -> Size:
    """The next multiples of `divisor`, at least one of it."""
    z, y, x = (max(1, math.ceil(edge / d)) * d for edge, d in zip(size, divisor, strict=True))
    return z, y, x


def _isotropic(spacing: Sequence[int | float], edge: int) -> Size:
    length = edge * min(spacing)
    z, y, x = (2 ** min(round(math.log2(edge)), max(0, round(math.log2(length / s)))) for s in spacing)
    return z, y, x


def _tokens(shape: Sequence[int | float], token: Size) -> list[int]:
    return [math.ceil(edge / t) for edge, t in zip(shape, token, strict=True)]
