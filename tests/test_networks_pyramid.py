"""Vectors of voxels: lookup, widths, projections, shares."""

import math

import pytest
import torch
from network_plans import primus_plans, unet_plans
from torch import nn
from torch.nn import functional as F

from nnssl_ext.networks.build import build_backbone
from nnssl_ext.networks.pyramid import (
    Balance,
    Projector,
    level_shares,
    look_up,
    look_up_all,
    pyramid,
    pyramid_channels,
)

PLANS = {"primus": primus_plans(), "resenc": unet_plans()}


@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 2, 2), (1, 2, 4), (3, 5, 2)])
def test_every_voxel_finds_its_own_cell_also_in_odd_sizes(stride):
    size = (7, 11, 9)  # no multiples: the last cells are cut off
    grid = [math.ceil(length / step) for length, step in zip(size, stride, strict=True)]
    cells = torch.stack(torch.meshgrid(*map(torch.arange, grid), indexing="ij"))[None].float()  # each holds its index
    voxels = torch.cartesian_prod(*map(torch.arange, size))[None]
    found = look_up(cells, stride, voxels)
    for voxel, cell in zip(voxels[0].tolist(), found[0].tolist(), strict=True):
        assert cell == [v // s for v, s in zip(voxel, stride, strict=True)]


def test_the_references_vector_has_1008_channels():
    levels = [torch.zeros(1, 16 * 2**i, *[32 // 2**i] * 3) for i in range(6)]
    vectors = look_up_all(levels, [(2**i,) * 3 for i in range(6)], torch.zeros(1, 4, 3, dtype=torch.long))
    assert torch.cat(vectors, -1).shape == (1, 4, 1008)


def test_samples_are_not_mixed_and_gradients_reach_the_looked_up_cells_only():
    level = torch.randn(2, 5, 3, 4, 4, requires_grad=True)
    voxels = torch.tensor([[[0, 0, 0], [5, 3, 7]], [[2, 6, 1], [2, 6, 1]]])
    found = look_up(level, (2, 2, 2), voxels)
    torch.testing.assert_close(found[0, 1], level[0, :, 2, 1, 3])
    torch.testing.assert_close(found[1, 0], level[1, :, 1, 3, 0])
    found.sum().backward()
    assert (level.grad[0].sum(0) != 0).nonzero().tolist() == [[0, 0, 0], [2, 1, 3]]
    assert (level.grad[1, :, 1, 3, 0] == 2).all()


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("decoder", [True, False])
def test_levels_of_backbones_are_as_announced(name, decoder):
    backbone = build_backbone(PLANS[name], "3d_fullres", 1)
    x = torch.randn(1, 1, 16, 16, 16)
    levels = pyramid(backbone, backbone.forward_features(x), decoder)
    assert tuple(level.shape[1] for level in levels.levels) == pyramid_channels(backbone, decoder)
    for level, stride in zip(levels.levels, levels.strides, strict=True):
        assert tuple(level.shape[2:]) == tuple(16 // step for step in stride)
    finest = (1, 1, 1) if decoder or name == "resenc" else (4, 4, 4)
    assert levels.strides[0] == finest
    assert levels.strides[-1] == backbone.strides[-1]


def test_balanced_levels_are_1x1x1_convolutions_of_the_maps():
    channels, voxels = (4, 8, 16), torch.randint(0, 8, (2, 6, 3))
    maps = [torch.randn(2, c, *[8 // 2**i] * 3) for i, c in enumerate(channels)]
    balance = Balance(channels, 32, trained=True)
    strides = [(1, 1, 1), (2, 2, 2), (4, 4, 4)]
    found = balance(tuple(look_up(m, s, voxels) for m, s in zip(maps, strides, strict=True)))
    for m, stride, linear, vector in zip(maps, strides, balance.levels, found, strict=True):
        convolved = F.conv3d(m, linear.weight[..., None, None, None], linear.bias)
        torch.testing.assert_close(vector, look_up(convolved, stride, voxels))
    assert [v.shape[-1] for v in found] == [32] * 3


@pytest.mark.parametrize("trained", [True, False])
def test_projections_are_parameters_that_move_only_if_trained(trained):
    torch.manual_seed(0)
    balance = Balance((4, 8), 3, trained)
    before = {name: value.clone() for name, value in balance.state_dict().items()}
    assert set(before) == {f"levels.{i}.{kind}" for i in (0, 1) for kind in ("weight", "bias")}
    optimizer = torch.optim.SGD(balance.parameters(), lr=0.1)
    vectors = tuple(torch.randn(1, 5, c, requires_grad=True) for c in (4, 8))
    sum(v.square().sum() for v in balance(vectors)).backward()
    optimizer.step()
    assert all(torch.equal(before[name], value) != trained for name, value in balance.state_dict().items())
    assert vectors[0].grad.any()  # frozen projections still pass gradients on


def test_projector_layout_is_the_papers():
    head = Projector(1008, 128)
    shapes = [(m.in_features, m.out_features) for m in head.modules() if isinstance(m, nn.Linear)]
    assert shapes == [(1008, 1008), (1008, 1008), (1008, 128)]
    assert sum(isinstance(m, nn.BatchNorm1d) for m in head.modules()) == 2


def test_projector_equals_a_sequence_on_the_valid_rows():
    torch.manual_seed(0)
    head, vectors = Projector(12, 6), torch.randn(2, 7, 12)
    valid = torch.rand(2, 7) < 0.6
    linear, norm = head.hidden, [nn.BatchNorm1d(12) for _ in range(2)]
    sequence = nn.Sequential(linear[0], norm[0], nn.ReLU(), linear[1], norm[1], nn.ReLU(), head.out)
    expected = F.normalize(sequence(vectors[valid]))
    changed = torch.where(valid[..., None], vectors, 1e3)
    torch.testing.assert_close(head(changed, valid)[valid], expected)
    assert head(vectors, valid).norm(dim=-1).allclose(torch.ones(2, 7))


def test_shares_of_the_levels():
    vectors = (torch.full((1, 3, 4), 1.0), torch.full((1, 3, 1), 2.0), torch.zeros(1, 3, 9))
    valid = torch.tensor([[True, True, False]])
    torch.testing.assert_close(level_shares(vectors, valid), torch.tensor([0.5, 0.5, 0.0]))
    assert level_shares(vectors, torch.zeros_like(valid)).tolist() == [0, 0, 0]
