"""Losses that features are trained with, on pairs whose correspondence is known."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from nnssl_ext.registration.learning import (
    LayerSettings,
    MapPair,
    comparable,
    contrast,
    find_correspondence,
    layer_displacement,
    layer_losses,
    textured,
    values_at,
)
from nnssl_ext.registration.solver import MIND_DIFFERENCE, SolverSettings
from nnssl_ext.registration.warp import compose, warp

SHAPE = (12, 16, 12)
MM = (1.0, 1.0, 1.0)


def smooth(channels=4, seed=0, shape=SHAPE):
    noise = torch.randn(1, channels, *shape, generator=torch.Generator().manual_seed(seed))
    return F.avg_pool3d(noise, 3, 1, 1, count_include_pad=False)[0]


def shifted_pair(shift=(2, 0, 0), spacing=MM) -> MapPair:
    """What lies at x in the fixed map lies at x + shift in the moving one, except where it came in from the other side."""
    fixed = smooth()
    target = torch.tensor(shift, dtype=torch.float32).view(3, 1, 1, 1).expand(3, *SHAPE)
    valid = torch.zeros(SHAPE, dtype=torch.bool)
    valid[1:-3, 3:-3, 3:-3] = True
    return MapPair(fixed, torch.roll(fixed, shift, (1, 2, 3)), target, valid, valid, spacing)


def test_comparable_maps_differ_by_as_much_as_minds_whatever_their_scale():
    pair = shifted_pair()
    found = comparable(replace(pair, fixed=7 * pair.fixed + 3, moving=7 * pair.moving + 3))
    torch.testing.assert_close(found.fixed, comparable(pair).fixed, atol=1e-4, rtol=1e-4)
    a, b = (side[:, found.valid] for side in (found.fixed, found.moving))
    unrelated = (a[:, :, None] - b[:, None]).square().mean()  # every place with every other
    assert 12 * unrelated.item() == pytest.approx(MIND_DIFFERENCE, rel=1e-3)


def test_the_layer_finds_a_shift_and_its_loss_sees_a_wrong_target():
    pair = comparable(shifted_pair())
    settings = LayerSettings(cell=2.0, search=2, temperature=200.0)
    _, true, weight, pooling = layer_displacement(pair, 1.0, settings)
    assert pooling == (2, 2, 2)
    torch.testing.assert_close(
        true[:, weight > 0], torch.tensor([1.0, 0.0, 0.0])[:, None].expand(3, int((weight > 0).sum()))
    )
    right = layer_losses(pair, 1.0, settings)["error"]
    wrong = layer_losses(replace(pair, target=-pair.target), 1.0, settings)["error"]
    assert right < 1 and wrong > 3  # mm
    twice = replace(pair, target=-pair.target, spacing=(2.0, 2.0, 2.0))
    assert layer_losses(twice, 2.0, settings)["error"].item() == pytest.approx(2 * wrong.item(), rel=1e-3)


def test_what_is_out_of_reach_has_no_weight():
    pair = shifted_pair()
    far = replace(pair, target=pair.target * 3)  # 3 cells of 2 voxels
    *_, weight, _ = layer_displacement(comparable(far), 1.0, LayerSettings(cell=2.0, search=2))
    assert weight.abs().max() == 0
    assert layer_losses(comparable(far), 1.0, LayerSettings(cell=2.0, search=2))["error"].item() == 0


def test_what_cannot_be_trusted_in_the_fixed_map_does_not_matter():
    valid = torch.zeros(SHAPE, dtype=torch.bool)
    valid[2:-4, 4:-4, 4:-4] = True  # whole cells
    pair = comparable(replace(shifted_pair(), valid=valid, distinct=valid))
    settings = LayerSettings(cell=2.0, search=2, temperature=200.0)
    found, _, weight, _ = layer_displacement(pair, 1.0, settings)
    other = replace(pair, fixed=torch.where(valid, pair.fixed, torch.tensor(3.0)))
    again, *_ = layer_displacement(other, 1.0, settings)
    torch.testing.assert_close(again[:, weight > 0], found[:, weight > 0])


def test_overlap_of_labels_that_the_layers_field_brings_together():
    pair = shifted_pair()
    label = torch.zeros(1, *SHAPE)
    label[:, 4:7, 5:10, 4:8] = 1
    pair = comparable(replace(pair, labels=(label, torch.roll(label, 2, 1))))
    losses = layer_losses(pair, 1.0, LayerSettings(cell=2.0, search=2, temperature=200.0))
    unmoved = 1 - 2 * (label * torch.roll(label, 2, 1)).sum() / (2 * label.sum())
    assert losses["overlap"] < 0.5 * unmoved


def test_contrast_is_low_at_the_target_and_high_elsewhere():
    pair = comparable(shifted_pair())
    right = contrast(pair, 64, 0.02)
    assert right < 0.25 * contrast(replace(pair, target=torch.zeros_like(pair.target)), 64, 0.02)
    blank = replace(pair, fixed=torch.zeros_like(pair.fixed), moving=torch.zeros_like(pair.moving))
    few = replace(blank, distinct=torch.zeros_like(pair.distinct))
    few.distinct[5, 5, 5] = few.distinct[5, 9, 5] = True
    dense = replace(few, distinct=few.distinct)
    assert contrast(dense, 10_000, 0.02).item() == pytest.approx(math.log(2), rel=1e-5)
    assert torch.equal(contrast(pair, 64, 0.02), right)  # the seed decides the places


def test_training_a_map_through_the_layer_and_the_contrast_lowers_both():
    """From noise: features of the moving map learn to be where the target says."""
    pair = shifted_pair()
    free = torch.randn(pair.moving.shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
    optimiser = torch.optim.Adam([free], lr=0.05)
    losses = []
    for _ in range(15):
        trained = comparable(replace(pair, moving=free))
        error = layer_losses(trained, 1.0, LayerSettings(cell=2.0, search=1))["error"]
        alike = contrast(trained, 64, 0.02)
        losses.append((error.item(), alike.item()))
        optimiser.zero_grad()
        (error + alike).backward()
        optimiser.step()
    assert losses[-1][0] < 0.8 * losses[0][0] and losses[-1][1] < 0.8 * losses[0][1]


def test_registered_correspondence_and_its_way_back():
    pair = shifted_pair()
    everything = torch.ones(SHAPE, dtype=torch.bool)
    settings = SolverSettings(coarse_mm=2.0, fine_mm=2.0, iterations=20)
    with torch.no_grad():  # as when pictures are drawn
        there, back = find_correspondence([(pair.fixed, pair.moving)], [1.0], (everything, everything), MM, settings)
    inner = (slice(None), slice(4, 8), slice(5, 11), slice(4, 8))
    assert (there[inner] - pair.target[inner]).abs().mean() < 0.4
    assert (back[inner] + pair.target[inner]).abs().mean() < 0.4
    assert not there.requires_grad


def test_the_way_back_is_the_inverse_and_not_the_opposite():
    size, generator = (24, 24, 24), torch.Generator().manual_seed(0)
    moving = F.interpolate(torch.rand(1, 4, 8, 8, 8, generator=generator), size, mode="trilinear")[0]
    wave = torch.sin(math.pi * torch.arange(24) / 23)
    swell = 3 * wave.view(-1, 1, 1) * wave.view(-1, 1) * wave
    fixed = warp(moving, torch.stack((swell, -swell, 0.5 * swell)))
    everything = torch.ones(size, dtype=torch.bool)
    settings = SolverSettings(coarse_mm=3.0, fine_mm=2.0, regularisation=0.3, iterations=40)
    there, back = find_correspondence([(fixed, moving)], [1.0], (everything, everything), MM, settings)
    inner = (slice(None), *(slice(5, -5),) * 3)
    found, opposite = (compose(there, field)[inner].norm(dim=0).mean() for field in (back, -there))
    assert found < 0.2 * opposite


def test_a_tenth_of_the_images_variation_is_texture_and_a_hundredth_is_not():
    noise = torch.randn(1, 40, 12, 12, generator=torch.Generator().manual_seed(0))
    noise[:, 20:30] *= 0.15
    noise[:, 30:] *= 0.01
    found = textured(noise)
    assert found[:28].all() and not found[33:].any()


def test_values_at_places_and_textured_voxels():
    volume = torch.arange(4.0).view(1, 4, 1, 1).expand(1, 4, 3, 3).contiguous()
    places = torch.tensor([[1.0, 1.0, 1.0], [1.5, 0.0, 2.0], [9.0, 1.0, 1.0]])
    torch.testing.assert_close(values_at(volume, places)[:, 0], torch.tensor([1.0, 1.5, 3.0]))
    image = torch.zeros(1, 20, 20, 20)
    image[:, 10:] = torch.randn(1, 10, 20, 20)
    there = textured(image)
    assert not there[:7].any() and there[13:].all()
    assert textured(torch.randn(1, 2, 20, 4)).all()  # crops of few thick slices
