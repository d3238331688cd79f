"""Fitting one tensor to another network. Each function says what it keeps exactly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from nnssl_ext.records import Size


def interpolate_positions(table: Float[Tensor, "1 L E"], source: Size, target: Size) -> Float[Tensor, "1 M E"]:
    """Learned positions of a token grid, for another grid over the same field of view.

    Trilinear between token centres (``align_corners=False``), tokens in C order of z, y, x, in fp32: the rule of nnU-Net's
    ``like_nnssl`` and of `SegmentationPrimus` itself, so the table may be resized here or at run time. Where two grids have
    the same number of tokens along an axis, that axis is untouched.

    Args:
        table: ``(1, L, E)`` with L the product of `source`.
        source, target: tokens along z, y, x.
    """
    z, y, x = source
    volume = rearrange(table.float(), "b (z y x) e -> b e z y x", z=z, y=y, x=x)
    resized = F.interpolate(volume, size=target, mode="trilinear", align_corners=False)
    return rearrange(resized, "b e z y x -> b (z y x) e").to(table.dtype)


def change_channels(kernel: Float[Tensor, "O I Z Y X"], channels: int) -> Float[Tensor, "O C Z Y X"]:
    """A first convolution for another number of image channels.

    Every new channel gets the sum over the old ones, divided by the new number. Kept exactly: the response to an image whose
    channels all show the same scan. From one channel this is repetition divided by N, as nnU-Net's ``like_nnssl`` does it; to
    one channel it is the sum. What told several old channels apart is lost, because nothing says which of them is which now.
    """
    return kernel.sum(dim=1, keepdim=True).expand(-1, channels, -1, -1, -1) / channels


def pad_kernel(kernel: Float[Tensor, "O I Z Y X"], size: Sequence[int]) -> Float[Tensor, "O I _Z _Y _X"]:
    """A convolution kernel with a rim of zeros, e.g. from [1, 3, 3] to [3, 3, 3].

    Exact, because nnU-Net pads the input by half the kernel: both see the same voxels. The other direction would drop weights.

    Raises:
        ValueError: an edge of `size` is even, or shorter than the kernel's.
    """
    given = tuple(kernel.shape[2:])
    if any(new < old or (new - old) % 2 for new, old in zip(size, given, strict=True)):
        raise ValueError(f"a kernel of {given} cannot be padded to {tuple(size)}")
    rims = [(new - old) // 2 for new, old in zip(size, given, strict=True)]
    return F.pad(kernel, [rim for axis in reversed(rims) for rim in (axis, axis)])


def resize_token_kernel(kernel: Float[Tensor, "O I _Z _Y _X"], size: Sequence[int]) -> Float[Tensor, "O I _z _y _x"]:
    """A patch embedding for tokens of other edges: FlexiViT's pseudo-inverse resize (arXiv:2212.08013), axis by axis.

    Among all kernels of the new size, this one's response to an image resized by the same factor comes nearest to the old
    response to the image itself. Growing tokens (linear interpolation) keeps it exactly; shrinking ones (block means) keeps
    it for images that are constant within each block.

    Args:
        size: voxels per token along z, y, x.
    """
    for axis, (old, new) in enumerate(zip(tuple(kernel.shape[2:]), size, strict=True), start=2):
        if new == old:
            continue
        identity = torch.eye(old, dtype=torch.float64)[None]
        resize = F.interpolate(identity, size=new, mode="linear" if new > old else "area")[0].T  # (new, old)
        weights = torch.linalg.pinv(resize.T).to(kernel)  # (new, old)
        kernel = torch.tensordot(kernel, weights, dims=([axis], [1])).movedim(-1, axis)
    return kernel.contiguous()
