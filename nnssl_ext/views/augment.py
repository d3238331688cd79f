"""Intensity augmentation of a batch on its device: one tensor operation per kind, over the samples that drew it.

Everything random was drawn beforehand. Noise comes from a generator seeded per sample, so it does not depend on the
composition of the batch: two processes with batch B and one with 2B add the same noise (on the same kind of device).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

Voxels = Float[Tensor, "B C Z Y X"]
Strength = Float[Tensor, " B"]
Seeds = Sequence[int]
SPATIAL = (2, 3, 4)
BLOCK = 32
"""Rows of a band matrix multiplied at a time; measured fastest at 160 cubed: half the time of the full product."""


def augment(voxels: Voxels, draws: Sequence[Mapping[str, float]]) -> Voxels:
    """Apply each sample's augmentations, in the order of `AUGMENTATIONS`; may overwrite `voxels`.

    Args:
        draws: per sample, augmentation -> strength, see `nnssl_ext.views.policies.draw_intensity`.
    """
    for name, apply in AUGMENTATIONS.items():
        rows = [row for row, draw in enumerate(draws) if name in draw]
        if not rows:
            continue
        strength = torch.tensor([draws[row][name] for row in rows])
        seeds = [int(draws[row].get("noise_seed", 0)) for row in rows]
        if len(rows) == len(draws):
            voxels = apply(voxels, strength, seeds)
        else:
            voxels[rows] = apply(voxels[rows], strength, seeds)
    return voxels


def noise(voxels: Voxels, std: Strength, seeds: Seeds) -> Voxels:
    """Add Gaussian noise of this standard deviation."""
    generator = torch.Generator(voxels.device)
    for sample, scale, seed in zip(voxels, std.tolist(), seeds, strict=True):
        drawn = torch.randn(sample.shape, generator=generator.manual_seed(seed), device=voxels.device)
        sample.add_(drawn, alpha=scale)
    return voxels


def blur(voxels: Voxels, sigma: Strength, seeds: Seeds) -> Voxels:
    """Gaussian blur with `sigma` voxels; the kernel is renormalised at borders."""

    def kernel(length: int) -> Float[Tensor, "B N N"]:
        place = torch.arange(length)
        deviations = (place - place[:, None]).abs() / sigma[:, None, None]
        # Cut off at 4 sigma (weight 3e-4): beyond, denormal numbers would make the product ten times slower.
        weights = torch.exp(-0.5 * deviations**2).where(deviations <= 4, 0.0)
        return weights / weights.sum(-1, keepdim=True)

    return separable(voxels, kernel)


def brightness(voxels: Voxels, factor: Strength, seeds: Seeds) -> Voxels:
    """Multiply."""
    return voxels.mul_(_wide(factor, voxels))


def contrast(voxels: Voxels, factor: Strength, seeds: Seeds) -> Voxels:
    """Stretch about each channel's mean, clamped to its former range."""
    mean = voxels.mean(SPATIAL, keepdim=True)
    low, high = voxels.amin(SPATIAL, keepdim=True), voxels.amax(SPATIAL, keepdim=True)
    return voxels.mul_(_wide(factor, voxels)).add_(mean * (1 - _wide(factor, voxels))).clamp_(low, high)


def low_resolution(voxels: Voxels, scale: Strength, seeds: Seeds) -> Voxels:
    """What is left after nearest-neighbour sampling at `scale` times the resolution and linear interpolation back."""

    def kernel(length: int) -> Float[Tensor, "B N N"]:
        weights = torch.empty(len(scale), length, length)
        for row, coarse in zip(weights, (scale * length).round().clamp(min=1).int().tolist(), strict=True):
            down = F.interpolate(torch.eye(length)[None], coarse, mode="nearest-exact")
            row.copy_(F.interpolate(down, length, mode="linear")[0].T)
        return weights

    return separable(voxels, kernel)


def gamma(voxels: Voxels, exponent: Strength, seeds: Seeds) -> Voxels:
    """Power law between each channel's minimum and maximum; its mean and standard deviation are then restored."""
    low, high = voxels.amin(SPATIAL, keepdim=True), voxels.amax(SPATIAL, keepdim=True)
    voxels.sub_(low).div_((high - low).clamp(min=1e-7))
    mean, std = _mean_std(voxels)
    voxels.pow_(_wide(exponent, voxels))
    new_mean, new_std = _mean_std(voxels)
    # Restoring mean and std, and the scale from [0, 1] back, in one multiplication and one addition.
    factor = std / new_std.clamp(min=1e-7)
    return voxels.mul_(factor * (high - low)).add_((mean - new_mean * factor) * (high - low) + low)


def gamma_inverted(voxels: Voxels, exponent: Strength, seeds: Seeds) -> Voxels:
    """`gamma` of the negative image."""
    return gamma(voxels.neg_(), exponent, seeds).neg_()


AUGMENTATIONS: dict[str, Callable[[Voxels, Strength, Seeds], Voxels]] = {
    "noise": noise,
    "blur": blur,
    "brightness": brightness,
    "contrast": contrast,
    "low_resolution": low_resolution,
    "gamma_inverted": gamma_inverted,
    "gamma": gamma,
}


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


def _wide(strength: Strength, like: Voxels) -> Float[Tensor, "B 1 1 1 1"]:
    return strength.to(like.device, non_blocking=True).view(-1, 1, 1, 1, 1)


def _mean_std(voxels: Voxels) -> tuple[Float[Tensor, "B C 1 1 1"], Float[Tensor, "B C 1 1 1"]]:
    """Of intensities in [0, 1]; needs no second copy of the image, as centring it first would."""
    mean = voxels.mean(SPATIAL, keepdim=True)
    square = torch.linalg.vector_norm(voxels, dim=SPATIAL, keepdim=True) ** 2 / voxels[0, 0].numel()
    return mean, (square - mean**2).clamp(min=0).sqrt()
