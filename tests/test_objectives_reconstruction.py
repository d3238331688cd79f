import numpy as np
import pytest
import torch

from nnssl_ext.objectives.reconstruction import (
    masked_error,
    patchify,
    token_statistics,
    unpatchify,
    upsample_mask,
)

TOKEN, GRID = (2, 3, 4), (3, 2, 2)
SIZE = tuple(t * g for t, g in zip(TOKEN, GRID, strict=True))


def test_patchify_lists_tokens_in_c_order_and_unpatchify_inverts_it():
    volume = torch.randn(2, 3, *SIZE)
    tokens = patchify(volume, TOKEN)
    assert torch.equal(unpatchify(tokens, TOKEN, GRID), volume)
    for flat, (z, y, x) in enumerate(np.ndindex(*GRID)):
        block = volume[:, :, z * 2 : z * 2 + 2, y * 3 : y * 3 + 3, x * 4 : x * 4 + 4]
        assert torch.equal(tokens[:, flat], block.flatten(1))


def test_upsampled_mask_covers_exactly_the_voxels_of_its_cells():
    mask = torch.rand(2, *GRID) < 0.5
    voxels = upsample_mask(mask, SIZE)
    assert torch.equal(voxels.float(), torch.nn.functional.interpolate(mask[:, None].float(), SIZE, mode="nearest"))


@pytest.mark.parametrize("power", [1, 2])
def test_masked_error_equals_loops(power):
    prediction, target = torch.randn(2, 3, 1, 2, 5, 4)
    weight = (torch.rand(3, 1, 2, 5, 4) < 0.4).float()
    per_sample = []
    for p, t, w in zip(prediction, target, weight, strict=True):
        errors = [abs(a - b) ** power for a, b, c in zip(p.ravel(), t.ravel(), w.ravel(), strict=True) if c]
        per_sample.append(sum(errors) / len(errors))
    assert masked_error(prediction, target, weight, power) == pytest.approx(float(sum(per_sample) / 3), rel=1e-5)


def test_masked_error_by_hand_and_without_any_masked_voxel():
    prediction, target = torch.tensor([[1.0, 5.0], [3.0, 9.0]]), torch.zeros(2, 2)
    weight = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    assert float(masked_error(prediction, target, weight)) == pytest.approx((1 + (9 + 81) / 2) / 2)
    assert float(masked_error(prediction, target, torch.zeros(2, 2))) == 0


def test_loss_of_a_batch_is_the_mean_of_its_halves_however_unequally_they_are_masked():
    prediction, target = torch.randn(2, 4, 50)
    weight = (torch.rand(4, 50) < torch.tensor([[0.1], [0.9], [0.4], [0.6]])).float()
    halves = [masked_error(prediction[i : i + 2], target[i : i + 2], weight[i : i + 2]) for i in (0, 2)]
    assert float(masked_error(prediction, target, weight)) == pytest.approx(float(sum(halves)) / 2, rel=1e-5)


def test_gradient_reaches_masked_voxels_only():
    prediction = torch.randn(2, 30, requires_grad=True)
    weight = (torch.rand(2, 30) < 0.5).float()
    masked_error(prediction, torch.randn(2, 30), weight).backward()
    assert torch.equal(prediction.grad != 0, weight.bool())


def test_zero_predictor_of_normalised_tokens_scores_n_minus_1_over_n():
    # the variance is unbiased, so the mean square of a normalised token is (n - 1) / n
    tokens = torch.randn(2, 5, 24) * torch.rand(2, 5, 1) * 10 + 3
    mean, std = token_statistics(tokens, torch.ones_like(tokens), flat_std=1e-6)
    normalised = (tokens - mean) / std
    assert float(masked_error(torch.zeros_like(normalised), normalised, torch.ones_like(normalised))) == pytest.approx(
        23 / 24, rel=1e-4
    )


def test_token_statistics_ignore_padding_and_do_not_amplify_flat_tokens():
    tokens = torch.randn(1, 2, 10)
    tokens[0, 1] = 1 + 1e-4 * torch.randn(10)
    valid = torch.ones(1, 2, 10)
    valid[0, 0, 6:] = 0
    mean, std = token_statistics(tokens, valid, flat_std=0.1)
    inside = tokens[0, 0, :6].numpy()
    assert float(mean[0, 0]) == pytest.approx(inside.mean(), rel=1e-4)
    assert float(std[0, 0]) == pytest.approx(inside.std(ddof=1), rel=1e-4)
    assert float(std[0, 1]) == pytest.approx(0.1)
    assert ((tokens[0, 1] - mean[0, 1]) / std[0, 1]).abs().max() < 0.01
