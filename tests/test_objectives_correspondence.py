import math

import pytest
import torch

from nnssl_ext.objectives.correspondence import displacement_error, overlap_loss, place_contrast

FAR = torch.arange(12.0)[:, None] * torch.tensor([10.0, 0.0, 0.0])
ALL = torch.ones(12, dtype=torch.bool)


def test_equal_features_give_ln_n_and_perfect_ones_nothing():
    same = torch.ones(12, 5)
    assert place_contrast(same, same, FAR, ALL, 0.1).item() == pytest.approx(math.log(12), rel=1e-6)
    apart = 10 * torch.eye(12)
    assert place_contrast(apart, apart, FAR, ALL, 0.1).item() == pytest.approx(0, abs=1e-6)


def test_contrast_equals_a_plain_loop_over_queries():
    torch.manual_seed(0)
    queries, keys, ends = torch.randn(12, 5), torch.randn(12, 5), torch.rand(12, 3) * 4
    valid = torch.rand(12) > 0.3
    losses = []
    for n in range(12):
        if not valid[n]:
            continue
        similarity = []
        for m in range(12):
            near = (ends[n] - ends[m]).abs().max() < 1.0
            if m == n or (valid[m] and not near):
                similarity.append(-((queries[n] - keys[m]) ** 2).mean() / 0.3)
            if m == n:
                right = similarity[-1]
        losses.append(torch.logsumexp(torch.stack(similarity), 0) - right)
    found = place_contrast(queries, keys, ends, valid, 0.3, exclusion=1.0)
    torch.testing.assert_close(found, torch.stack(losses).mean())
    assert place_contrast(queries, keys, ends, torch.zeros_like(valid), 0.3).item() == 0


def test_places_near_along_every_axis_are_no_negatives():
    """0.8 cells apart along two axes: 1.13 cells apart, but near."""
    ends, same = torch.tensor([[0.0, 0, 0], [0.8, 0.8, 0]]), torch.ones(2, 5)
    assert place_contrast(same, same, ends, torch.ones(2, dtype=torch.bool), 0.1, exclusion=1.0).item() == 0


def test_displacement_error_is_the_mean_distance_where_it_counts():
    true = torch.zeros(3, 2, 2, 2)
    found = true.clone()
    found[:, 0] = torch.tensor([3.0, 4.0, 12.0]).view(3, 1, 1)  # 13 long
    weight = torch.ones(2, 2, 2)
    assert displacement_error(found, true, weight).item() == pytest.approx(6.5, abs=1e-3)
    weight[1] = 0
    assert displacement_error(found, true, weight).item() == pytest.approx(13, abs=1e-4)
    true.requires_grad_()
    displacement_error(true, true.detach(), weight).backward()
    assert torch.isfinite(true.grad).all()


def test_overlap_by_hand():
    fixed, warped = torch.zeros(3, 1, 1, 4), torch.zeros(3, 1, 1, 4)
    fixed[0, 0, 0, :2], warped[0, 0, 0, 1:3] = 1, 1  # Dice 1/2
    fixed[1, 0, 0, 3] = 1  # Dice 0; the third label is nowhere
    everywhere = torch.ones(1, 1, 4)
    assert overlap_loss(fixed, warped, everywhere).item() == pytest.approx(0.75)
    everywhere[..., 0] = 0
    assert overlap_loss(fixed, warped, everywhere).item() == pytest.approx((1 - 2 / 3 + 1) / 2)
    assert overlap_loss(fixed * 0, warped * 0, everywhere).item() == 0
