"""Noise, loss of resolution and hidden channels, and the seeds that they come from."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from nnssl_ext.records import Case
from nnssl_ext.views.disruptions import SeededView, add_noise, draw_hidden, lower_resolution
from nnssl_ext.views.recipes import STILL


def test_noise_has_the_variance_asked_for_in_each_channel():
    clean = torch.randn(2, 2, 40, 40, 40)
    before = clean.clone()
    noisy = add_noise(clean, torch.tensor([0.1**0.5, 2.0]), [3, 4])
    assert torch.equal(clean, before)
    drawn = noisy - clean
    count = 40**3
    for sample in drawn:
        for channel, variance in zip(sample, (0.1, 4.0), strict=True):
            assert channel.var() == pytest.approx(variance, rel=5 * (2 / count) ** 0.5)  # 5 standard errors
            assert channel.mean() == pytest.approx(0, abs=5 * (variance / count) ** 0.5)
    assert abs(float((drawn[0, 0] * drawn[1, 0]).mean())) < 5 * 0.1 / count**0.5  # samples differ


def test_noise_of_a_sample_does_not_depend_on_its_batch():
    clean, std = torch.randn(3, 1, 5, 6, 7), torch.ones(1)
    together = add_noise(clean, std, [7, 8, 9])
    assert torch.equal(together[1:2], add_noise(clean[1:2], std, [8]))
    assert not torch.equal(together[1:2], add_noise(clean[1:2], std, [9]))


def test_lowered_resolution_is_that_of_the_released_code():
    clean = torch.randn(2, 2, 8, 12, 16)
    low = F.interpolate(clean, size=(2, 3, 4))
    assert torch.equal(lower_resolution(clean, (4, 4, 4)), F.interpolate(low, size=(8, 12, 16)))


@pytest.mark.parametrize("factors", [(4, 4, 4), (1, 4, 2)])
def test_blocks_are_constant_and_show_their_first_voxel(factors):
    size = (9, 10, 8)  # no multiples
    clean = torch.randn(1, 1, *size)
    lowered = lower_resolution(clean, factors)
    for place in np.ndindex(*size):
        first = tuple(i // f * f for i, f in zip(place, factors, strict=True))
        assert lowered[(0, 0, *place)] == clean[(0, 0, *first)]


def test_a_factor_of_one_changes_nothing():
    clean = torch.randn(1, 2, 5, 6, 7)
    assert torch.equal(lower_resolution(clean, (1, 1, 1)), clean)


@pytest.mark.parametrize(
    ("channels", "expected"), [(48, 28), (32, 19), (864, 518)]
)  # the paper's, a ResEnc's, Primus-M's
def test_the_floor_of_the_share_is_hidden_in_every_sample(channels, expected):
    hidden = draw_hidden(channels, 0.6, range(5))
    assert hidden.shape == (5, channels)
    assert hidden.sum(1).tolist() == [expected] * 5
    assert len({tuple(row.tolist()) for row in hidden}) == 5  # one set per sample
    assert torch.equal(draw_hidden(channels, 0.6, [3]), hidden[3:4])


def test_every_channel_is_hidden_equally_often():
    often = draw_hidden(10, 0.6, range(2000)).float().mean(0)
    assert often.numpy() == pytest.approx(np.full(10, 0.6), abs=5 * (0.24 / 2000) ** 0.5)


def test_plain_crops_are_not_turned_and_carry_seeds_and_modality():
    policy, rng = SeededView((8, 8, 8), STILL), np.random.default_rng(0)
    cases = [Case(str(i), Path(), 1, (20, 20, 20), (1.0, 1.0, 1.0), m) for i, m in enumerate(("T1", "T1ce", "T1"))]
    drawn = [policy.draw(case, rng, 0.5)[0] for case in cases]
    for draw in drawn:
        assert np.array_equal(draw.affine[:3, :3], np.eye(3)) and not draw.intensity and draw.mask is None
    modality = [draw.facts["modality"] for draw in drawn]
    assert modality[0] == modality[2] != modality[1]
    assert len({draw.facts[name] for draw in drawn for name in ("noise_seed", "channels_seed")}) == 6
    again = policy.draw(cases[0], np.random.default_rng(0), 0.5)[0]
    assert again.facts == drawn[0].facts
