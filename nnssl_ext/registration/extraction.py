"""Feature maps of one volume from any backbone: whole or in tiles, at the network's resolution or finer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from nnssl_ext.contracts import Backbone
from nnssl_ext.errors import NnsslError, unknown_name
from nnssl_ext.networks.segmentation_layer import segmentation_layer
from nnssl_ext.records import Size
from nnssl_ext.registration.tiling import Encode, tiled

Volume = Float[Tensor, "C Z Y X"]
LABELS = "labels"
"""The level of what a network tells of labels, where its segmentation layer was trained."""
# Beyond these tokens attention, quadratic in them, takes minutes even where memory allows (a guess, not measured on GPUs).
LONGEST_SEQUENCE = {"cpu": 20_000, "cuda": 300_000}
# Live float32 values at the widest point of a pass, counted and rounded up: 15.9 to 17.7 per token and channel (residual, norm,
# q, k, v, positions, both halves of a gated MLP), 2.7 per voxel and channel of what is decoded from tokens; 5.7 (ResEnc) and 6.7 (plain
# U-Net) per voxel and channel of the widest map, without the decoder 4 and 3. Windows of a Swin take 1.4 times that.
LIVE_PER_TOKEN, LIVE_PER_DECODED, LIVE_PER_VOXEL = 18, 3, 7


@dataclass(frozen=True)
class ExtractionSettings:
    """How features are read from a backbone.

    Attributes:
        level: ``encoder<i>`` or ``decoder<i>``, 0 the finest; ``labels``, the probabilities of the segmentation layer's labels; ""
            for the encoder's finest level that is coarser than the image, which for token backbones is the token map.
        shifts: passes per axis over the volume shifted by equal parts of the level's stride, interlaced: 2 gives half the
            stride for 8 passes. At most the stride itself; encoder levels only.
        zoom: the volume is enlarged by this factor first: 2 gives half the stride for 8 times the tokens.
        tile: voxels (of the enlarged volume) per pass; None: the whole volume where `memory_gib` and time allow, else tiles of
            the patch that the network was planned for.
        overlap: part of a tile's edge that it shares with the next tile. The outer quarter of it is not used at all, so that
            tiles give what the whole volume gives to networks that see no further. Instance norms see the whole volume in
            either case (`tiling`), for one pass over all tiles per layer; attention ends where its tile ends.
        memory_gib: what one pass may take, by a rough estimate. A registration also holds the features of both scans on its
            common grid to it, where nothing else decides how fine that is (`pipeline.PairSettings.spacing`).
    """

    level: str = ""
    shifts: int = 1
    zoom: int = 1
    tile: Size | None = None
    overlap: float = 0.5
    memory_gib: float = 8.0


@dataclass(frozen=True)
class FeatureMap:
    """Features on a grid of their own inside a volume.

    Attributes:
        values: ``(C, z, y, x)``.
        stride: voxels of the volume between neighbours, per axis.
        offset: voxel (not necessarily whole) of the first one, per axis.
    """

    values: Float[Tensor, "C z y x"]
    stride: tuple[float, float, float]
    offset: tuple[float, float, float]

    @classmethod
    def over(cls, size: Size, values: Float[Tensor, "C z y x"]) -> FeatureMap:
        """Features of cells that fill a volume of `size` voxels."""
        sz, sy, sx = (n / count for n, count in zip(size, values.shape[1:], strict=True))
        return cls(values, (sz, sy, sx), ((sz - 1) / 2, (sy - 1) / 2, (sx - 1) / 2))

    def on_grid(self, size: Size) -> Float[Tensor, "C Z Y X"]:
        """The features at every voxel of the volume, linearly interpolated; the outermost ones are repeated."""
        values = self.values
        for axis, (length, stride, offset) in enumerate(zip(size, self.stride, self.offset, strict=True), start=1):
            values = _interpolated(values, axis, length, stride, offset)
        return values

    def at(self, points: Int[Tensor, "N 3"], mode: Literal["linear", "nearest"] = "linear") -> Float[Tensor, "N C"]:
        """The features at some voxels z, y, x of the volume, interpolated, or those of the cell that the voxel lies in."""
        size = points.new_tensor(self.values.shape[1:])
        stride, offset = (torch.tensor(each, device=points.device) for each in (self.stride, self.offset))
        place = (2 * (points - offset) / stride + 1) / size - 1  # -1 and 1: the outer faces of the map
        found = functional.grid_sample(
            self.values[None].float(),
            place.float().flip(-1).view(1, -1, 1, 1, 3),
            mode="bilinear" if mode == "linear" else "nearest",
            padding_mode="border",
            align_corners=False,
        )
        return found[0, :, :, 0, 0].T

    def pick(self, mask: Bool[Tensor, "Z Y X"]) -> Bool[Tensor, "z y x"]:
        """The mask's value at the voxel nearest to each feature; False for features of what filled the volume up."""
        for axis, (stride, offset) in enumerate(zip(self.stride, self.offset, strict=True)):
            count, length = self.values.shape[axis + 1], mask.shape[axis]
            places = (torch.arange(count, device=mask.device) * stride + offset).round().long()
            mask = mask.index_select(axis, places.clamp(0, length - 1))
            outside = (places < 0) | (places >= length)
            mask = mask & ~outside.view([-1 if other == axis else 1 for other in range(3)])
        return mask


@torch.no_grad()
def extract(
    backbone: Backbone,
    volume: Volume,
    settings: ExtractionSettings = ExtractionSettings(),
    patch_size: Size | None = None,
) -> FeatureMap:
    """Features of a whole volume. The backbone should be in evaluation mode, on the volume's device.

    Args:
        volume: normalised, at the spacing the backbone was trained for. Zeros fill it up to what the backbone demands, as
            in training.
        patch_size: voxels per tile where the volume needs tiles and `settings` name none.

    Raises:
        NnsslError: unknown level, shifts of a decoder level, or a tile that the backbone cannot take.
    """
    encode, stride = _level(backbone, settings)
    parts = _size(math.gcd(settings.shifts, edge) for edge in stride)
    step = _size(edge // count for edge, count in zip(stride, parts, strict=True))
    zoom = float(settings.zoom)
    if zoom > 1:
        volume = functional.interpolate(volume[None], scale_factor=zoom, mode="trilinear", align_corners=False)[0]
    needed = [n + edge - small for n, edge, small in zip(volume.shape[1:], stride, step, strict=True)]
    padded = _divisible(needed, backbone.divisor)
    encode = _in_tiles(encode, backbone, padded, settings, patch_size, volume.device)
    values: Tensor | None = None
    for index in itertools.product(*map(range, parts)):
        before = [number * small for number, small in zip(index, step, strict=True)]
        found = encode(_padded(volume, before, padded))[0].float()
        if parts == (1, 1, 1):
            values = found
            break
        if values is None:
            values = found.new_empty((len(found), *(n * p for n, p in zip(found.shape[1:], parts, strict=True))))
        # the further a volume was shifted to the right, the further left its features saw
        values[(slice(None), *(slice(p - 1 - i, None, p) for p, i in zip(parts, index, strict=True)))] = found
    assert values is not None
    fine = [n / count for n, count in zip(padded, values.shape[1:], strict=True)]
    first = [(edge - 1) / 2 - (edge - small) for edge, small in zip(stride, step, strict=True)]
    if not settings.level.startswith("encoder") and settings.level:
        first = [(edge - 1) / 2 for edge in fine]
    sz, sy, sx = (edge / zoom for edge in fine)
    oz, oy, ox = ((offset + 0.5) / zoom - 0.5 for offset in first)
    return FeatureMap(values, (sz, sy, sx), (oz, oy, ox))


@torch.no_grad()
def extract_pyramid(
    backbone: Backbone, volume: Volume, patch_size: Size | None = None, decoder: bool = False
) -> tuple[FeatureMap, ...]:
    """Features of a whole volume on every level, finest first, from one pass per tile; see `extract`.

    Args:
        decoder: the decoder's maps and, below them, the encoder's coarsest, instead of the encoder's levels.
    """

    def encode(voxels: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(voxels.device.type, torch.bfloat16, enabled=voxels.device.type == "cuda"):
            features = backbone.forward_features(voxels[None])
            levels = (*backbone.forward_decoder(features).levels, features.levels[-1]) if decoder else features.levels
            return tuple(level[0] for level in levels)

    padded = _divisible(volume.shape[1:], backbone.divisor)
    settings = ExtractionSettings(level="decoder0" if decoder else "encoder0")
    encode_all = _in_tiles(encode, backbone, padded, settings, patch_size, volume.device)
    return tuple(FeatureMap.over(padded, values.float()) for values in encode_all(_padded(volume, [0, 0, 0], padded)))


def pass_gib(backbone: Backbone, size: Size, decoder: bool) -> float:
    """What one pass over so many voxels takes beside the weights, in float32, by estimate; a GPU's bfloat16 takes less.

    Args:
        decoder: the decoder is passed too.
    """
    voxels = math.prod(size)
    if backbone.token_size is None:
        maps = zip(backbone.channels + backbone.decoder_channels, itertools.cycle(backbone.strides), strict=False)
        values = LIVE_PER_VOXEL * voxels * max(channels / math.prod(stride) for channels, stride in maps)
    else:
        tokens = LIVE_PER_TOKEN * backbone.channels[0] * voxels / math.prod(backbone.token_size)
        values = voxels + max(tokens, decoder * LIVE_PER_DECODED * backbone.decoder_channels[0] * voxels)
    return 4 * values / 2**30


def fits(backbone: Backbone, size: Size, decoder: bool, memory_gib: float, device: torch.device) -> bool:
    """Whether one pass over so many voxels stays within memory and within a sensible sequence length, by estimate."""
    if pass_gib(backbone, size, decoder) > memory_gib:
        return False
    if backbone.token_size is None:
        return True
    tokens = math.prod(size) // math.prod(backbone.token_size)
    return tokens <= LONGEST_SEQUENCE.get(device.type, LONGEST_SEQUENCE["cpu"])


def _level(backbone: Backbone, settings: ExtractionSettings) -> tuple[Encode, Size]:
    """A function from voxels to a level's map, and the stride by parts of which passes may be shifted."""
    coarse = [i for i, stride in enumerate(backbone.strides) if max(stride) > 1]
    name = settings.level or f"encoder{coarse[0]}"
    levels = {"encoder": len(backbone.channels), "decoder": len(backbone.decoder_channels)}
    known = [*(f"{kind}{i}" for kind, count in levels.items() for i in range(count)), LABELS]
    if name not in known:
        raise unknown_name("level of the network", name, known)
    in_encoder, index = name.startswith("encoder"), 0 if name == LABELS else int(name[7:])
    if not in_encoder and settings.shifts > 1:
        raise NnsslError(f"shifted passes cannot be interlaced for {name}", "use an encoder level, or one pass")

    def encode(voxels: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(voxels.device.type, torch.bfloat16, enabled=voxels.device.type == "cuda"):
            features = backbone.forward_features(voxels[None])
            maps = (features if in_encoder else backbone.forward_decoder(features)).levels[index]
            if name == LABELS:
                maps = segmentation_layer(backbone.network)[1](maps).float().softmax(dim=1)
            return (maps[0],)

    return encode, backbone.strides[index] if in_encoder else (1, 1, 1)


def _in_tiles(
    encode: Encode,
    backbone: Backbone,
    size: Size,
    settings: ExtractionSettings,
    patch_size: Size | None,
    device: torch.device,
) -> Encode:
    """The same for volumes that do not fit, or where tiles are asked for."""
    tile = settings.tile
    decoder = not settings.level.startswith("encoder") and settings.level != ""
    if tile is None and patch_size is not None and not fits(backbone, size, decoder, settings.memory_gib, device):
        tile = patch_size
    return encode if tile is None else tiled(encode, backbone.network, backbone.divisor, tile, settings.overlap)


def _padded(volume: Volume, before: list[int], size: Size) -> Float[Tensor, "C z y x"]:
    """The volume with zeros before it and after it."""
    after = [n - length - first for n, length, first in zip(size, volume.shape[1:], before, strict=True)]
    return functional.pad(volume, (before[2], after[2], before[1], after[1], before[0], after[0]))


def _interpolated(values: Tensor, axis: int, length: int, stride: float, offset: float) -> Tensor:
    """Linear interpolation along one axis at voxels 0 ... length - 1."""
    if stride == 1 and offset == 0 and values.shape[axis] >= length:
        return values.narrow(axis, 0, length)
    last = values.shape[axis] - 1
    place = ((torch.arange(length, device=values.device) - offset) / stride).clamp(0, last)
    lower = place.floor().long().clamp(max=max(last - 1, 0))
    share = (place - lower).to(values.dtype).view([-1 if other == axis else 1 for other in range(4)])
    first = values.index_select(axis, lower)
    return torch.lerp(first, values.index_select(axis, (lower + 1).clamp(max=last)), share)


def _divisible(size: Iterable[int], divisor: Size) -> Size:
    """The smallest size around `size` that the backbone takes."""
    return _size(-(-n // unit) * unit for n, unit in zip(size, divisor, strict=True))


def _size(lengths: Iterable[int]) -> Size:
    z, y, x = lengths
    return z, y, x
