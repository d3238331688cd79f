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
SPATIAL = (2, 3, 4)


def augment(voxels: Voxels, draws: Sequence[Mapping[str, float]]) -> Voxels:
    """Apply each sample's augmentations, in the order of `AUGMENTATIONS`; overwrites and returns `voxels`."""
    for name, apply in AUGMENTATIONS.items():
        rows = [row for row, draw in enumerate(draws) if name in draw]
        if not rows:
            continue
        strength = torch.tensor([draws[row][name] for row in rows], device=voxels.device)
        if name == "noise":
            add_noise(voxels, rows, strength, [int(draws[row]["noise_seed"]) for row in rows])
        elif len(rows) == len(draws):
            voxels = apply(voxels, strength)
        else:
            voxels[rows] = apply(voxels[rows], strength)
    return voxels


def add_noise(voxels: Voxels, rows: Sequence[int], std: Strength, seeds: Sequence[int]) -> None:
    """Add Gaussian noise to these samples, in place."""
    for row, scale, seed in zip(rows, std, seeds, strict=True):
        generator = torch.Generator(voxels.device).manual_seed(seed)
        noise = torch.randn(voxels.shape[1:], generator=generator, device=voxels.device)
        voxels[row].add_(noise.mul_(scale))


def blur(voxels: Voxels, sigma: Strength) -> Voxels:
    """Gaussian blur with `sigma` voxels; the kernel is renormalised at borders."""

    def kernel(length: int) -> Float[Tensor, "B N N"]:
        place = torch.arange(length, device=sigma.device)
        weights = torch.exp(-0.5 * ((place - place[:, None]) / sigma[:, None, None]) ** 2)
        return weights / weights.sum(-1, keepdim=True)

    return separable(voxels, kernel)


def brightness(voxels: Voxels, factor: Strength) -> Voxels:
    """Multiply."""
    return voxels.mul_(_wide(factor))


def contrast(voxels: Voxels, factor: Strength) -> Voxels:
    """Stretch about each channel's mean, clamped to its former range."""
    mean, low, high = voxels.mean(SPATIAL, keepdim=True), *_range(voxels)
    return voxels.mul_(_wide(factor)).add_(mean * (1 - _wide(factor))).clamp_(low, high)


def low_resolution(voxels: Voxels, scale: Strength) -> Voxels:
    """What is left after nearest-neighbour sampling at `scale` times the resolution and linear interpolation back."""

    def kernel(length: int) -> Float[Tensor, "B N N"]:
        weights = torch.zeros(len(scale), length, length)
        for row, coarse in zip(weights, (scale * length).round().clamp(min=1).int().tolist(), strict=True):
            identity = torch.eye(length)[None]
            down = F.interpolate(identity, coarse, mode="nearest-exact")
            row.copy_(F.interpolate(down, length, mode="linear")[0].T)
        return weights.to(scale.device)

    return separable(voxels, kernel)


def gamma(voxels: Voxels, exponent: Strength) -> Voxels:
    """Power law between each channel's minimum and maximum; its mean and standard deviation are then restored."""
    std, mean = torch.std_mean(voxels, SPATIAL, keepdim=True)
    low, high = _range(voxels)
    # The scale back to [low, high] is left out: restoring mean and std undoes any scale and shift.
    voxels.sub_(low).div_((high - low).clamp(min=1e-7)).pow_(_wide(exponent))
    new_std, new_mean = torch.std_mean(voxels, SPATIAL, keepdim=True)
    factor = std / new_std.clamp(min=1e-7)
    return voxels.mul_(factor).add_(mean - new_mean * factor)


def gamma_inverted(voxels: Voxels, exponent: Strength) -> Voxels:
    """`gamma` of the negative image."""
    return gamma(voxels.neg_(), exponent).neg_()


AUGMENTATIONS: dict[str, Callable[[Voxels, Strength], Voxels]] = {
    "noise": brightness,
    "blur": blur,
    "brightness": brightness,
    "contrast": contrast,
    "low_resolution": low_resolution,
    "gamma_inverted": gamma_inverted,
    "gamma": gamma,
}


def separable(voxels: Voxels, kernel: Callable[[int], Float[Tensor, "B N N"]]) -> Voxels:
    """Multiply each axis of every sample by the matrix ``kernel(length)[b]``."""
    b, c, z, y, x = voxels.shape
    along_z, along_y, along_x = (kernel(length)[:, None] for length in (z, y, x))
    voxels = (along_z @ voxels.view(b, c, z, y * x)).view(b, c, z, y, x)
    voxels = along_y[:, None] @ voxels
    return (voxels.view(b, c, z * y, x) @ along_x.mT).view(b, c, z, y, x)


def _wide(strength: Strength) -> Float[Tensor, "B 1 1 1 1"]:
    return strength.view(-1, 1, 1, 1, 1)


def _range(voxels: Voxels) -> tuple[Float[Tensor, "B C 1 1 1"], Float[Tensor, "B C 1 1 1"]]:
    low, high = torch.aminmax(voxels.flatten(2), dim=2)
    return low[..., None, None, None], high[..., None, None, None]
