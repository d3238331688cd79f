"""Masked reconstruction losses (MAE, He et al., arXiv:2111.06377; SimMIM, Xie et al., arXiv:2111.09886).

Letters: B samples, C channels, ``Z Y X`` voxels, L tokens in C order of the token grid, P = C * voxels per token.
"""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from nnssl_ext.records import Size


def patchify(x: Float[Tensor, "B C Z Y X"], token_size: Size) -> Float[Tensor, "B L P"]:
    """Cut volumes into tokens, flattened channel first; the inverse of `unpatchify`."""
    z, y, x_ = token_size
    return rearrange(x, "b c (gz z) (gy y) (gx x) -> b (gz gy gx) (c z y x)", z=z, y=y, x=x_)


def unpatchify(tokens: Float[Tensor, "B L P"], token_size: Size, grid: Size) -> Float[Tensor, "B C Z Y X"]:
    """Put tokens of a ``grid`` back into volumes."""
    (z, y, x), (gz, gy, gx) = token_size, grid
    return rearrange(tokens, "b (gz gy gx) (c z y x) -> b c (gz z) (gy y) (gx x)", gz=gz, gy=gy, gx=gx, z=z, y=y, x=x)


def upsample_mask(mask: Bool[Tensor, "B z y x"], size: Size) -> Bool[Tensor, "B 1 Z Y X"]:
    """A mask on any grid that divides ``size``, as a mask of voxels."""
    for axis, voxels in enumerate(size, start=1):
        mask = mask.repeat_interleave(voxels // mask.shape[axis], dim=axis)
    return mask[:, None]


def token_statistics(
    tokens: Float[Tensor, "B L P"], valid: Float[Tensor, "B L P"], flat_std: float
) -> tuple[Float[Tensor, "B L 1"], Float[Tensor, "B L 1"]]:
    """Mean and standard deviation of each token's valid voxels.

    The standard deviation is unbiased, as in MAE's released code, and at least ``flat_std``: without that floor,
    noise in air or padding would be blown up to unit variance and dominate the loss.

    Args:
        tokens: voxel values.
        valid: 1 for voxels inside the case, else 0.
        flat_std: floor, in units of the normalised image.
    """
    count = valid.sum(-1, keepdim=True)
    mean = (tokens * valid).sum(-1, keepdim=True) / count.clamp(min=1)
    variance = ((tokens - mean).square() * valid).sum(-1, keepdim=True) / (count - 1).clamp(min=1)
    return mean, variance.sqrt().clamp(min=flat_std)


def masked_error(
    prediction: Float[Tensor, B * shape],
    target: Float[Tensor, B * shape],
    weight: Float[Tensor, B * shape],
    power: int = 2,
) -> Float[Tensor, ""]:
    """Weighted mean of ``|prediction - target| ** power``: over the voxels of each sample, then over samples.

    Averaging per sample first makes the loss of a batch the mean of the losses of its parts, whatever share of each
    sample is masked or padding; so data-parallel gradients equal those of one large batch.

    Args:
        weight: 1 where the error counts (masked and inside the case), else 0. A sample of zeros contributes 0.
        power: 2 for MAE (mean squared error), 1 for SimMIM (L1).
    """
    error = (prediction.float() - target.float()).abs().pow(power) * weight
    dims = tuple(range(1, error.ndim))
    per_sample = error.sum(dims) / weight.sum(dims).clamp(min=1)
    return torch.mean(per_sample)
