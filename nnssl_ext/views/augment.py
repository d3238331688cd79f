"""Intensity augmentation of a batch on its device: one tensor operation per kind, over the samples that drew it.

Everything random was drawn beforehand, or comes from a generator seeded per sample, so it does not depend on the
composition of the batch: two processes with batch B and one with 2B add the same noise (on the same kind of device).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from nnssl_ext.views.corruptions import bias_field, cutout, gibbs, histogram_shift, random_convolutions
from nnssl_ext.views.filters import (
    SPATIAL,
    Seeds,
    Strength,
    Voxels,
    gaussian,
    gaussian_in_plane,
    mean_std,
    separable,
    wide,
)
from nnssl_ext.views.local_corruptions import bezier, inpaint, shuffle


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
        seeds = [int(draws[row].get(f"{name}_seed", 0)) for row in rows]
        if len(rows) == len(draws):
            voxels = apply(voxels, strength, seeds)
        else:
            index = torch.tensor(rows).to(voxels.device, non_blocking=True)  # a list as index would wait for the device
            voxels.index_copy_(0, index, apply(voxels.index_select(0, index), strength, seeds))
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
    return gaussian(voxels, sigma)


def sharpen(voxels: Voxels, amount: Strength, seeds: Seeds) -> Voxels:
    """Add `amount` times what a Gaussian blur of 1 voxel takes away."""
    blurred = gaussian(voxels.clone(), torch.ones(len(amount)))
    return voxels.add_((voxels - blurred).mul_(wide(amount, voxels)))


def axial_blur(voxels: Voxels, sigma: Strength, seeds: Seeds) -> Voxels:
    """Gaussian blur with `sigma` voxels inside each slice along z."""
    return gaussian_in_plane(voxels, sigma)


def axial_sharpen(voxels: Voxels, amount: Strength, seeds: Seeds) -> Voxels:
    """Add `amount` times what a Gaussian blur of 0.5 voxels inside each slice takes away (vox2vec)."""
    blurred = gaussian_in_plane(voxels.clone(), torch.full_like(amount, 0.5))
    return voxels.add_((voxels - blurred).mul_(wide(amount, voxels)))


def floor(voxels: Voxels, lowest: Strength, seeds: Seeds) -> Voxels:
    """Raise what is darker to this intensity, in the first channel: a window means nothing on another channel's scale."""
    voxels[:, :1] = torch.maximum(voxels[:, :1], wide(lowest, voxels))
    return voxels


def ceiling(voxels: Voxels, highest: Strength, seeds: Seeds) -> Voxels:
    """Lower what is brighter to this intensity, in the first channel."""
    voxels[:, :1] = torch.minimum(voxels[:, :1], wide(highest, voxels))
    return voxels


def window_gain(voxels: Voxels, factor: Strength, seeds: Seeds) -> Voxels:
    """Multiply the first channel."""
    voxels[:, :1].mul_(wide(factor, voxels))
    return voxels


def window_shift(voxels: Voxels, offset: Strength, seeds: Seeds) -> Voxels:
    """Add a constant to the first channel."""
    voxels[:, :1].add_(wide(offset, voxels))
    return voxels


def brightness(voxels: Voxels, factor: Strength, seeds: Seeds) -> Voxels:
    """Multiply."""
    return voxels.mul_(wide(factor, voxels))


def shift(voxels: Voxels, offset: Strength, seeds: Seeds) -> Voxels:
    """Add a constant."""
    return voxels.add_(wide(offset, voxels))


def contrast(voxels: Voxels, factor: Strength, seeds: Seeds) -> Voxels:
    """Stretch about each channel's mean, clamped to its former range."""
    mean = voxels.mean(SPATIAL, keepdim=True)
    low, high = voxels.amin(SPATIAL, keepdim=True), voxels.amax(SPATIAL, keepdim=True)
    return voxels.mul_(wide(factor, voxels)).add_(mean * (1 - wide(factor, voxels))).clamp_(low, high)


def low_resolution(voxels: Voxels, scale: Strength, seeds: Seeds) -> Voxels:
    """What is left after nearest-neighbour sampling at `scale` times the resolution and linear interpolation back."""

    def kernel(length: int) -> Float[Tensor, "B N N"]:
        weights = torch.empty(len(scale), length, length)
        for row, coarse in zip(weights, (scale * length).round().clamp(min=1).int().tolist(), strict=True):
            down = F.interpolate(torch.eye(length)[None], coarse, mode="nearest-exact")
            row.copy_(F.interpolate(down, length, mode="linear")[0].T)
        return weights

    return separable(voxels, kernel)


def power_law(voxels: Voxels, exponent: Strength, seeds: Seeds) -> Voxels:
    """Power law between each channel's minimum and maximum, which changes mean and standard deviation (MONAI's default)."""
    low, high = voxels.amin(SPATIAL, keepdim=True), voxels.amax(SPATIAL, keepdim=True)
    span = (high - low).clamp(min=1e-7)
    return voxels.sub_(low).div_(span).pow_(wide(exponent, voxels)).mul_(span).add_(low)


def gamma(voxels: Voxels, exponent: Strength, seeds: Seeds) -> Voxels:
    """Power law between each channel's minimum and maximum; its mean and standard deviation are then restored."""
    low, high = voxels.amin(SPATIAL, keepdim=True), voxels.amax(SPATIAL, keepdim=True)
    voxels.sub_(low).div_((high - low).clamp(min=1e-7))
    mean, std = mean_std(voxels)
    voxels.pow_(wide(exponent, voxels))
    new_mean, new_std = mean_std(voxels)
    # Restoring mean and std, and the scale from [0, 1] back, in one multiplication and one addition.
    factor = std / new_std.clamp(min=1e-7)
    return voxels.mul_(factor * (high - low)).add_((mean - new_mean * factor) * (high - low) + low)


def gamma_inverted(voxels: Voxels, exponent: Strength, seeds: Seeds) -> Voxels:
    """`gamma` of the negative image."""
    return gamma(voxels.neg_(), exponent, seeds).neg_()


AUGMENTATIONS: dict[str, Callable[[Voxels, Strength, Seeds], Voxels]] = {
    "random_convolutions": random_convolutions,
    "histogram_shift": histogram_shift,
    "bias_field": bias_field,
    "axial_blur": axial_blur,
    "axial_sharpen": axial_sharpen,
    "noise": noise,
    "blur": blur,
    "sharpen": sharpen,
    "floor": floor,
    "ceiling": ceiling,
    "window_gain": window_gain,
    "window_shift": window_shift,
    "brightness": brightness,
    "shift": shift,
    "contrast": contrast,
    "low_resolution": low_resolution,
    "gamma_inverted": gamma_inverted,
    "gamma": gamma,
    "power_law": power_law,
    "gibbs": gibbs,
    "shuffle": shuffle,
    "bezier": bezier,
    "inpaint": inpaint,
    "cutout": cutout,
}
"""In the order of application: the scanner's contrast and field, noise and resolution, the window, what is hidden."""
