"""Feature maps of volumes that are too large for one pass: from overlapping tiles, normalised as the whole volume would be.

Instance norm divides by the statistics of what it is shown, so a tile's features would depend on where tiles are cut. Here every
such layer gets the statistics of the whole volume instead, layer after layer: a pass over all tiles up to the layer counts each
voxel once, after which the layer is settled and the next one can be asked. Settling all layers at once in a few passes does not
work: statistics gathered behind layers that still change are wrong, and with them the errors grow (measured, up to 10^8-fold).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.instancenorm import _InstanceNorm
from tqdm import tqdm

from nnssl_ext.errors import NnsslError
from nnssl_ext.records import Size

Encode = Callable[[Tensor], tuple[Tensor, ...]]
"""``(C, Z, Y, X)`` voxels to maps ``(E, z, y, x)`` of features."""
Statistics = tuple[Float[Tensor, " C"], Float[Tensor, " C"]]
"""Mean and variance per channel."""


def tiled(encode: Encode, network: nn.Module, divisor: Size, tile: Size, overlap: float) -> Encode:
    """The same features from overlapping windows, blended linearly.

    They equal those of the whole volume if nothing in `network` but instance norm looks further than a quarter of what
    neighbours share. That holds for the finer levels of convolutional networks, and for no level of a transformer.

    Args:
        network: what `encode` runs.
        divisor: edges of tiles must be multiples of it.
        overlap: part of a tile's edge that it shares with the next tile; the outer quarter of it is not used.

    Raises:
        NnsslError: a tile of other edges.
    """
    if any(edge % unit for edge, unit in zip(tile, divisor, strict=True)):
        raise NnsslError(f"tiles of {tile} voxels", f"make every edge a multiple of {divisor}")

    def whole(volume: Tensor) -> tuple[Tensor, ...]:
        tiles = _tiles(volume.shape[1:], divisor, tile, overlap)
        if len(tiles) == 1:
            return encode(volume)
        with _settled_norms(encode, network, divisor, volume, tiles):
            return _blended(encode, volume, tiles)

    return whole


@dataclass(frozen=True)
class _Span:
    """A tile along one axis, in voxels.

    Attributes:
        lower, length: where it begins, and its edge.
        before, after: what it shares with its neighbours; 0 where it has none.
    """

    lower: int
    length: int
    before: int
    after: int

    def core(self, count: int) -> slice:
        """Of `count` places along this tile, those that no other tile counts: shared voxels go halves."""
        first, last = self.before // 2, self.length - self.after + self.after // 2
        return slice(first * count // self.length, last * count // self.length)

    def places(self, count: int) -> slice:
        """Where `count` places along this tile lie in a map of the volume."""
        first = self.lower * count // self.length
        return slice(first, first + count)

    def weight(self, count: int) -> Float[Tensor, " N"]:
        """0 in the outer quarter of what is shared with a neighbour, then rising to 1 over half of it."""
        centres = (torch.arange(count) + 0.5) * (self.length / count)
        weight = torch.ones(count)
        for shared, distance in ((self.before, centres), (self.after, self.length - centres)):
            if shared:
                weight = torch.minimum(weight, ((distance - shared / 4) / (shared / 2)).clamp(0, 1))
        return weight


Tile = tuple[_Span, _Span, _Span]


def _tiles(size: Sequence[int], divisor: Size, tile: Size, overlap: float) -> list[Tile]:
    """Tiles that cover a volume, the last one of an axis flush with its end."""
    axes = []
    for length, unit, wanted in zip(size, divisor, tile, strict=True):
        edge = min(wanted, length)
        step = max(unit, int(edge * (1 - overlap)) // unit * unit)
        starts = [*range(0, length - edge, step), length - edge]
        shared = [0, *(start + edge - following for start, following in itertools.pairwise(starts)), 0]
        ends = itertools.pairwise(shared)
        axes.append([_Span(start, edge, *both) for start, both in zip(starts, ends, strict=True)])
    z, y, x = axes
    return list(itertools.product(z, y, x))


def _cut(volume: Tensor, tile: Tile) -> Tensor:
    z, y, x = (slice(span.lower, span.lower + span.length) for span in tile)
    return volume[:, z, y, x]


def _blended(encode: Encode, volume: Tensor, tiles: Sequence[Tile]) -> tuple[Tensor, ...]:
    sums: list[tuple[Tensor, Tensor]] = []
    for tile in tiles:
        parts = encode(_cut(volume, tile))
        if not sums:
            sums = [_empty(part, volume, tile) for part in parts]
        for (total, weights), part in zip(sums, parts, strict=True):
            counts = part.shape[1:]
            z, y, x = (span.weight(count).to(total) for span, count in zip(tile, counts, strict=True))
            weight = z[:, None, None] * y[:, None] * x
            place = tuple(span.places(count) for span, count in zip(tile, counts, strict=True))
            total[(slice(None), *place)] += part.float() * weight
            weights[place] += weight
    return tuple(total / weights for total, weights in sums)


def _empty(part: Float[Tensor, "E _z _y _x"], volume: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
    """A map of the volume like that of a tile, and the weights of its places; zeros."""
    counts = zip(volume.shape[1:], part.shape[1:], tile, strict=True)
    shape = [n * count // span.length for n, count, span in counts]
    return part.new_zeros((len(part), *shape), dtype=torch.float32), part.new_zeros(shape, dtype=torch.float32)


class _Reached(Exception):
    """A pass over a tile has come to the layer whose statistics it was for."""


@contextmanager
def _settled_norms(
    encode: Encode, network: nn.Module, divisor: Size, volume: Tensor, tiles: Sequence[Tile]
) -> Iterator[None]:
    """Inside, the instance norms before the features use the statistics of the whole volume."""
    settled: dict[nn.Module, Statistics] = {}

    def settle(norm: nn.Module) -> Statistics:
        """Mean and variance of what reaches a layer, each place counted once."""
        sums: Tensor | float = 0.0
        tile = tiles[0]

        def collect(_: nn.Module, inputs: tuple[Tensor]) -> None:
            nonlocal sums
            values = inputs[0]
            z, y, x = (span.core(count) for span, count in zip(tile, values.shape[2:], strict=True))
            core = values[:, :, z, y, x].float()
            variance, mean = (part.double() for part in torch.var_mean(core, dim=(0, 2, 3, 4), correction=0))
            count = core[:, 0].numel()
            sums = sums + count * torch.stack((torch.ones_like(mean), mean, variance + mean.square()))
            raise _Reached

        with norm.register_forward_pre_hook(collect):
            for tile in tiles:
                with suppress(_Reached):
                    encode(_cut(volume, tile))
        count, total, square = cast(Tensor, sums)
        mean = total / count
        return mean.float(), (square / count - mean.square()).clamp(min=0).float()

    def normalise(norm: Any, inputs: tuple[Tensor], _: Tensor) -> Tensor | None:
        if norm not in settled:
            return None
        return functional.batch_norm(inputs[0], *settled[norm], norm.weight, norm.bias, eps=norm.eps)

    norms = _norms_before(encode, network, divisor, volume)
    with ExitStack() as hooks:
        for norm in norms:
            hooks.enter_context(norm.register_forward_hook(normalise))
        for norm in tqdm(norms, desc="statistics of the whole volume", unit="layer", leave=False, delay=5):
            settled[norm] = settle(norm)
        yield


def _norms_before(encode: Encode, network: nn.Module, divisor: Size, volume: Tensor) -> list[nn.Module]:
    """The instance norms that the features depend on, in the order of their use: those that a gradient reaches."""
    shifts: dict[nn.Module, Tensor] = {}

    def shift(norm: nn.Module, _: tuple[Tensor], output: Tensor) -> Tensor:
        shifts[norm] = output.new_zeros((), requires_grad=True)
        return output + shifts[norm]

    with ExitStack() as hooks, torch.enable_grad():
        for module in network.modules():
            if isinstance(module, _InstanceNorm):
                hooks.enter_context(module.register_forward_hook(shift))
        features = encode(volume.new_zeros((len(volume), *(2 * unit for unit in divisor))))
        if not shifts:
            return []
        total = torch.stack([maps.float().sum() for maps in features]).sum()
        reached = torch.autograd.grad(total, list(shifts.values()), allow_unused=True)
    return [norm for norm, gradient in zip(shifts, reached, strict=True) if gradient is not None]
