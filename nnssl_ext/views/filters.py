"""Separable filters of batched volumes with a strength per sample, and the shapes that augmentations share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

Voxels = Float[Tensor, "B C Z Y X"]
Strength = Float[Tensor, " B"]
Seeds = Sequence[int]
SPATIAL = (2, 3, 4)
BLOCK = 32
"""Rows of a band matrix multiplied at a time; measured fastest at 160 cubed: half the time of the full product."""


def gaussian(voxels: Voxels, sigma: Strength) -> Voxels:
    """Gaussian blur with `sigma` voxels, the kernel renormalised at borders; overwrites `voxels`."""
    return separable(voxels, partial(_gaussian_kernel, sigma))


def gaussian_in_plane(voxels: Voxels, sigma: Strength) -> Voxels:
    """`gaussian` inside each slice along z; overwrites `voxels`."""
    other = torch.empty_like(voxels)
    _multiply(_gaussian_kernel(sigma, voxels.shape[3]), voxels.flatten(1, 2), other.flatten(1, 2))
    _multiply(
        _gaussian_kernel(sigma, voxels.shape[4]), other.flatten(1, 3).mT[:, None], voxels.flatten(1, 3).mT[:, None]
    )
    return voxels


def _gaussian_kernel(sigma: Strength, length: int) -> Float[Tensor, "B N N"]:
    place = torch.arange(length)
    deviations = (place - place[:, None]).abs() / sigma[:, None, None]
    # Cut off at 4 sigma (weight 3e-4): beyond, denormal numbers would make the product ten times slower.
    weights = torch.exp(-0.5 * deviations**2).where(deviations <= 4, 0.0)
    return weights / weights.sum(-1, keepdim=True)


def separable(voxels: Voxels, kernel: Callable[[int], Float[Tensor, "B N N"]]) -> Voxels:
    """Multiply each axis of every sample by the matrix ``kernel(length)[b]``; overwrites `voxels`."""
    # Fresh memory costs the CPU as much as the product itself, so two buffers are used in turn.
    other = torch.empty_like(voxels)
    _multiply(kernel(voxels.shape[2]), voxels.flatten(3), other.flatten(3))
    _multiply(kernel(voxels.shape[3]), other.flatten(1, 2), voxels.flatten(1, 2))
    _multiply(kernel(voxels.shape[4]), voxels.flatten(1, 3).mT[:, None], other.flatten(1, 3).mT[:, None])
    return other


def _multiply(
    matrix: Float[Tensor, "B N N"], source: Float[Tensor, "B K N M"], target: Float[Tensor, "B K N M"]
) -> None:
    """``target = matrix @ source``, leaving out the zeros of a band matrix, in blocks of rows."""
    length = matrix.shape[1]
    row, column = matrix.any(0).nonzero(as_tuple=True)
    reach = int((row - column).abs().max())
    matrix = matrix.to(source.device, non_blocking=True)[:, None]
    for first in range(0, length, BLOCK):
        rows, columns = slice(first, first + BLOCK), slice(max(first - reach, 0), first + BLOCK + reach)
        target[:, :, rows] = matrix[:, :, rows, columns] @ source[:, :, columns]


def wide(strength: Strength, like: Voxels) -> Float[Tensor, "B 1 1 1 1"]:
    """Strengths on the device of `like`, ready to be multiplied with it."""
    return strength.to(like.device, non_blocking=True).view(-1, 1, 1, 1, 1)


def mean_std(voxels: Voxels) -> tuple[Float[Tensor, "B C 1 1 1"], Float[Tensor, "B C 1 1 1"]]:
    """Of intensities within a few units of 0; needs no second copy of the image, as centring it first would."""
    mean = voxels.mean(SPATIAL, keepdim=True)
    square = torch.linalg.vector_norm(voxels, dim=SPATIAL, keepdim=True) ** 2 / voxels[0, 0].numel()
    return mean, (square - mean**2).clamp(min=0).sqrt()
