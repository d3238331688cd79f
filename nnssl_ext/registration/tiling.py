"""Feature maps of a volume from windows that fit into memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from nnssl_ext.errors import NnsslError
from nnssl_ext.records import Size

Encode = Callable[[Tensor], tuple[Tensor, ...]]
"""``(C, Z, Y, X)`` voxels to maps ``(E, z, y, x)`` of features."""


def tiled(encode: Encode, divisor: Size, tile: Size, overlap: float) -> Encode:
    """The same features from overlapping windows, blended linearly.

    Args:
        divisor: what the edges of every window must be multiples of.
        tile: voxels of a window.
        overlap: part of a window's edge that it shares with the next one. The outer quarter of it is not used at all, so that
            windows give what the whole volume gives to networks that see no further.

    Raises:
        NnsslError: a tile that the backbone cannot take.
    """
    if any(edge % unit for edge, unit in zip(tile, divisor, strict=True)):
        raise NnsslError(f"tiles of {tile} voxels", f"make every edge a multiple of {divisor}")

    def whole(volume: Tensor) -> tuple[Tensor, ...]:
        size = tuple(volume.shape[1:])
        window = tuple(map(min, tile, size))
        steps = [
            max(unit, int(edge * (1 - overlap)) // unit * unit) for edge, unit in zip(window, divisor, strict=True)
        ]
        starts = [_starts(n, edge, step) for n, edge, step in zip(size, window, steps, strict=True)]
        sums: list[tuple[Tensor, Tensor]] = []
        for lower in itertools.product(*starts):
            parts = encode(volume[(slice(None), *(slice(a, a + n) for a, n in zip(lower, window, strict=True)))])
            strides = [[edge // count for edge, count in zip(window, part.shape[1:], strict=True)] for part in parts]
            if not sums:
                shapes = [[n // edge for n, edge in zip(size, stride, strict=True)] for stride in strides]
                sums = [
                    (volume.new_zeros((len(part), *shape)), volume.new_zeros(shape))
                    for part, shape in zip(parts, shapes, strict=True)
                ]
            for (total, weights), part, stride in zip(sums, parts, strides, strict=True):
                ramps = [
                    _ramp(count, edge, n - step, at > 0, at + n < end).to(volume)
                    for count, edge, n, step, at, end in zip(
                        part.shape[1:], stride, window, steps, lower, size, strict=True
                    )
                ]
                weight = ramps[0][:, None, None] * ramps[1][:, None] * ramps[2]
                place = tuple(
                    slice(at // edge, at // edge + count)
                    for at, edge, count in zip(lower, stride, part.shape[1:], strict=True)
                )
                total[(slice(None), *place)] += part * weight
                weights[place] += weight
        return tuple(total / weights for total, weights in sums)

    return whole


def _starts(length: int, window: int, step: int) -> list[int]:
    """First voxels of windows that cover an axis, the last one flush with its end."""
    return [*range(0, length - window, step), length - window]


def _ramp(count: int, stride: int, shared: int, left: bool, right: bool) -> Float[Tensor, " N"]:
    """Weights along one axis of a tile: 0 in the outer quarter of what it shares with a neighbour, then rising to 1."""
    centres = (torch.arange(count) + 0.5) * stride
    weight = torch.ones(count)
    for neighbour, distance in ((left, centres), (right, count * stride - centres)):
        if neighbour and shared:
            weight = torch.minimum(weight, ((distance - shared / 4) / (shared / 2)).clamp(0, 1))
    return weight
