"""Where features lie, and that shifts, enlargement and tiles do not move them."""

from __future__ import annotations

import weakref
from collections import Counter

import pytest
import torch
from checkpoint_helpers import plans_of, primus, resenc, shake
from network_plans import PLAIN, unet_plans
from torch.nn import functional
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from nnssl_ext.errors import NnsslError
from nnssl_ext.networks.build import build_backbone
from nnssl_ext.records import Features
from nnssl_ext.registration import extraction, tiling
from nnssl_ext.registration.extraction import (
    ExtractionSettings,
    FeatureMap,
    _level,
    extract,
    extract_pyramid,
    fits,
    pass_gib,
)

STRIDE = (4, 4, 2)


class MeanOfCells(torch.nn.Module):
    """A backbone whose features are means over its cells, after a 3x3x3 convolution: it sees one voxel beyond them."""

    channels, strides, decoder_channels = (2,), (STRIDE,), (2,)
    divisor, token_size = STRIDE, None
    encoder_prefixes, decoder_prefixes = ("encoder.",), ("decoder.",)

    def __init__(self, convolve: bool = False) -> None:
        super().__init__()
        self.network = torch.nn.Identity()
        self.convolve, self.sizes = convolve, []

    def forward_features(self, x, mask=None):
        self.sizes.append(tuple(x.shape[2:]))
        if self.convolve:
            x = functional.conv3d(x, torch.linspace(-1, 1, 54).view(2, 1, 3, 3, 3), padding=1).sin()
        pooled = functional.avg_pool3d(x, STRIDE)
        return Features(levels=(pooled,), strides=self.strides, summary=pooled.mean(dim=(2, 3, 4)))

    def forward_decoder(self, features):
        levels = tuple(functional.interpolate(level, scale_factor=(2.0, 2.0, 1.0)) for level in features.levels)
        return Features(levels=levels, strides=((2, 2, 2),), summary=features.summary)


def ramps(shape=(24, 20, 14)) -> torch.Tensor:
    """A volume of three channels that hold their voxel's z, y and x."""
    return torch.stack(torch.meshgrid(*(torch.arange(float(n)) for n in shape), indexing="ij"))


@pytest.mark.parametrize(("shifts", "stride"), [(1, (4, 4, 2)), (2, (2, 2, 1)), (4, (1, 1, 1))])
@pytest.mark.parametrize("zoom", [1, 2])
@pytest.mark.parametrize("tile", [None, (12, 8, 6)])
def test_features_lie_where_they_say(shifts, stride, zoom, tile):
    """The mean of a ramp over a cell is the coordinate of the cell's centre."""
    volume = ramps()
    found = extract(MeanOfCells(), volume, ExtractionSettings(shifts=shifts, zoom=zoom, tile=tile))
    assert found.stride == tuple(s / zoom for s in stride)
    for axis in range(3):
        places = torch.arange(found.values.shape[axis + 1]) * found.stride[axis] + found.offset[axis]
        along = found.values[axis].movedim(axis, 0)
        # cells that reach beyond the volume average zeros in, and enlarging repeats the border
        reach = STRIDE[axis] / zoom / 2 + (1 if zoom > 1 else -0.5)
        inside = (places >= reach) & (places <= volume.shape[axis + 1] - 1 - reach)
        middle = along[inside, along.shape[1] // 2, along.shape[2] // 2]
        assert inside.sum() >= 2
        assert torch.allclose(middle, places[inside], atol=1e-4)


def test_maps_are_interpolated_at_their_places():
    values = torch.tensor([0.0, 4.0, 8.0]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    grid = FeatureMap(values, (4.0, 1.0, 1.0), (1.5, 0.0, 0.0)).on_grid((12, 2, 2))[0, :, 0, 0]
    assert torch.allclose(grid, (torch.arange(12.0) - 1.5).clamp(0, 8))


@pytest.mark.parametrize("shape", [(24, 24, 24), (30, 17, 9)])
def test_tiles_equal_the_whole_for_a_network_that_sees_no_further_than_their_margin(shape):
    volume = torch.rand(1, *shape, generator=torch.Generator().manual_seed(0))
    whole, tiled = MeanOfCells(convolve=True), MeanOfCells(convolve=True)
    expected = extract(whole, volume).values
    found = extract(tiled, volume, ExtractionSettings(tile=(12, 12, 12), overlap=0.4)).values
    assert set(tiled.sizes) != set(whole.sizes)
    assert (found - expected).abs().max() < 1e-5


def uneven(*shape: int) -> torch.Tensor:
    """Texture whose mean and contrast rise along every axis, so that every tile has statistics of its own."""
    rise = sum(torch.meshgrid(*(torch.linspace(0, 1, n) for n in shape), indexing="ij"))
    return (rise**2 * (2 + torch.randn(shape, generator=torch.Generator().manual_seed(1))))[None]


@pytest.mark.parametrize(("level", "layers"), [("encoder0", 3), ("encoder1", 6), ("decoder0", 7)])
def test_tiles_equal_the_whole_for_a_network_that_normalises_over_all_it_sees(level, layers, monkeypatch):
    """Tiles that normalise for themselves are far off (asked for below, so that the test can fail)."""
    architecture = resenc(2, n_blocks_per_stage=[1, 1])
    backbone = build_backbone(plans_of(architecture, [16, 16, 16]), "3d_fullres", 1).eval().requires_grad_(False)
    shake(backbone.network)
    volume, tiles = uneven(48, 44, 15), ExtractionSettings(level=level, tile=(40, 36, 16), overlap=0.8)
    expected = extract(backbone, volume, ExtractionSettings(level=level)).values
    found = extract(backbone, volume, tiles).values
    assert float((found - expected).norm() / expected.norm()) < 1e-3
    asked = tiling._norms_before(_level(backbone, tiles)[0], backbone.network, backbone.divisor, volume)
    assert len(asked) == layers  # each costs a pass, so none that the level does not depend on
    norms = [module for module in backbone.network.modules() if isinstance(module, torch.nn.InstanceNorm3d)]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in norms)
    monkeypatch.setattr(tiling, "_norms_before", lambda *_: [])
    apart = extract(backbone, volume, tiles).values
    assert float((apart - expected).norm() / expected.norm()) > 0.05


def test_masks_are_read_at_the_features_places():
    mask = torch.zeros(8, 2, 2, dtype=torch.bool)
    mask[4:] = True
    found = FeatureMap(torch.zeros(1, 3, 2, 2), (4.0, 1.0, 1.0), (1.5, 0.0, 0.0)).pick(mask)
    assert found[:, 0, 0].tolist() == [False, True, False]  # the last feature lies in what filled the volume up


@pytest.mark.parametrize("architecture", [primus([16, 16, 16]), resenc()])
def test_any_size_of_volume_and_any_level(architecture):
    backbone = build_backbone(plans_of(architecture, [16, 16, 16]), "3d_fullres", 1).eval()
    volume = torch.rand(1, 13, 18, 21)
    for number, (channels, stride) in enumerate(zip(backbone.channels, backbone.strides, strict=True)):
        found = extract(backbone, volume, ExtractionSettings(level=f"encoder{number}"))
        assert len(found.values) == channels and found.stride == tuple(map(float, stride))
        assert found.on_grid((13, 18, 21)).shape == (channels, 13, 18, 21)
    finest = extract(backbone, volume, ExtractionSettings(level="decoder0"))
    assert len(finest.values) == backbone.decoder_channels[0] and finest.stride == (1.0, 1.0, 1.0)


def test_a_token_map_shifted_by_a_token_is_the_map_without_its_first_token():
    """Interlaced passes hold the unshifted pass unchanged."""
    backbone = build_backbone(plans_of(primus([16, 16, 16]), [16, 16, 16]), "3d_fullres", 1).eval()
    volume = torch.rand(1, 16, 16, 16)
    fine = extract(backbone, volume, ExtractionSettings(shifts=2))
    padded = functional.pad(volume, (0, 4, 0, 4, 0, 4))  # interlacing needs one more token
    coarse = extract(backbone, padded)
    assert torch.allclose(fine.values[:, 1::2, 1::2, 1::2], coarse.values, atol=1e-5)
    assert [o + s for o, s in zip(fine.offset, fine.stride, strict=True)] == list(coarse.offset)


def test_settings_that_do_not_fit_are_named():
    backbone = MeanOfCells()
    with pytest.raises(NnsslError, match="did you mean 'encoder0'"):
        extract(backbone, ramps(), ExtractionSettings(level="encoder7"))
    with pytest.raises(NnsslError, match="multiple"):
        extract(backbone, ramps(), ExtractionSettings(tile=(10, 8, 8)))
    with pytest.raises(NnsslError, match="interlaced"):
        extract(backbone, ramps(), ExtractionSettings(level="decoder0", shifts=2))


def test_large_volumes_go_through_in_tiles_of_the_patch():
    backbone = MeanOfCells()
    assert fits(backbone, (24, 20, 14), False, 1.0, torch.device("cpu"))
    assert not fits(backbone, (24, 20, 14), False, 1e-5, torch.device("cpu"))
    extract(backbone, ramps(), ExtractionSettings(memory_gib=1e-5), patch_size=(12, 8, 6))
    assert max(backbone.sizes) == (12, 8, 6)


class Alive(TorchDispatchMode):
    """Bytes of all tensors that live at a time, and most of them at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.holders: Counter[int] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in filter(torch.is_tensor, pytree.tree_leaves(made)):
            storage = tensor.untyped_storage()
            self._count(storage._cdata, storage.nbytes(), 1)
            weakref.finalize(tensor, self._count, storage._cdata, storage.nbytes(), -1)
        return made

    def _count(self, storage: int, size: int, change: int) -> None:
        before = self.holders[storage] > 0
        self.holders[storage] += change
        self.now += size * ((self.holders[storage] > 0) - before)
        self.most = max(self.most, self.now)


@pytest.mark.parametrize("level", ["", "decoder0"])
@pytest.mark.parametrize("network", ["tokens", "few tokens of many voxels", "residual", "plain"])
def test_a_pass_takes_what_is_estimated(network, level):
    """Never more; no less than 0.4 of it, where a U-Net's decoder is left out."""
    plain = unet_plans(PLAIN)["configurations"]["3d_fullres"]["architecture"]
    plain["arch_kwargs"] |= {"n_conv_per_stage": [2, 2, 2], "n_conv_per_stage_decoder": [2, 2]}
    architecture = {
        "tokens": primus([32, 32, 32], strides=2, embed_dim=144, eva_numheads=4, decoder_widths=[24, 8]),
        "few tokens of many voxels": primus([32, 32, 32], strides=3, embed_dim=36, decoder_widths=[24, 16, 12]),
        "residual": resenc(),
        "plain": plain,
    }[network]
    backbone = build_backbone(plans_of(architecture, [32, 32, 32]), "3d_fullres", 1).eval()
    volume = torch.randn(1, 32, 32, 32)
    with Alive() as alive:
        extract(backbone, volume, ExtractionSettings(level=level))
    assert 0.4 < alive.most / 2**30 / pass_gib(backbone, (32, 32, 32), decoder=level == "decoder0") <= 1


@pytest.mark.parametrize("tiles", [False, True])
def test_a_pyramid_is_every_level_as_it_is_alone(tiles, monkeypatch):
    """One pass per tile, the same features at the same places as level by level."""
    torch.manual_seed(0)
    backbone = build_backbone(plans_of(resenc(), [16, 16, 16]), "3d_fullres", 1).eval()
    volume = torch.randn(1, 30, 21, 18)  # no multiples of the strides
    if tiles:
        monkeypatch.setattr(extraction, "fits", lambda *_: False)
    found = extract_pyramid(backbone, volume, (16, 16, 16))
    deep = extract_pyramid(backbone, volume, (16, 16, 16), decoder=True)
    names = [f"encoder{i}" for i in range(3)], ["decoder0", "decoder1", "encoder2"]
    for levels, asked in zip((found, deep), names, strict=True):
        for level, name in zip(levels, asked, strict=True):
            alone = extract(backbone, volume, ExtractionSettings(level=name), (16, 16, 16))
            assert level.stride == alone.stride and level.offset == alone.offset
            assert torch.allclose(level.values, alone.values, atol=1e-5)
    assert [level.stride[0] for level in found] == [1, 2, 4]
