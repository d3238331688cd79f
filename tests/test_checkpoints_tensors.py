"""Changes of one tensor against hand values, and against the function they promise to keep."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nnssl_ext.checkpoints.tensors import change_channels, interpolate_positions, pad_kernel, resize_token_kernel


def test_positions_between_two_tokens_by_hand():
    """Two tokens 0 and 1 along x, spread over four: centres at -1/4, 1/4, 3/4, 5/4 of the old ones, clamped at the ends."""
    table = torch.tensor([[[0.0], [1.0]]])
    resized = interpolate_positions(table, (1, 1, 2), (1, 1, 4))
    assert resized.flatten().tolist() == pytest.approx([0.0, 0.25, 0.75, 1.0])


def test_positions_keep_the_axis_they_vary_along():
    """A table that says its own y index must still say it on another grid: tokens are in C order of z, y, x."""
    z, y, x = 2, 4, 3
    table = torch.arange(y).float()[None, :, None].expand(z, y, x).reshape(1, -1, 1)
    resized = interpolate_positions(table, (z, y, x), (5, 2, 3)).reshape(5, 2, 3)
    assert torch.allclose(resized, torch.tensor([0.5, 2.5])[None, :, None].expand(5, 2, 3))


def test_positions_on_the_same_grid_are_untouched():
    table = torch.randn(1, 24, 6)
    assert torch.equal(interpolate_positions(table, (2, 3, 4), (2, 3, 4)), table)


@pytest.mark.parametrize(("old", "new"), [(1, 1), (1, 2), (1, 4), (3, 1), (2, 3)])
def test_channels_keep_the_response_to_a_repeated_scan(old, new):
    scan, kernel = torch.randn(1, 1, 8, 8, 8), torch.randn(5, old, 3, 3, 3)
    before = F.conv3d(scan.expand(-1, old, -1, -1, -1), kernel)
    after = F.conv3d(scan.expand(-1, new, -1, -1, -1), change_channels(kernel, new))
    assert torch.allclose(before, after, atol=1e-5)


def test_channels_by_hand():
    assert change_channels(torch.full((1, 1, 1, 1, 1), 6.0), 3).flatten().tolist() == [2.0, 2.0, 2.0]
    assert change_channels(torch.tensor([1.0, 2.0]).reshape(1, 2, 1, 1, 1), 1).flatten().tolist() == [3.0]


@pytest.mark.parametrize(("old", "new"), [((1, 3, 3), (3, 3, 3)), ((1, 1, 3), (5, 3, 3))])
@pytest.mark.parametrize("stride", [1, 2])
def test_padded_kernels_see_the_same_voxels(old, new, stride):
    image, kernel = torch.randn(1, 2, 8, 8, 8), torch.randn(4, 2, *old)
    before = F.conv3d(image, kernel, stride=stride, padding=[k // 2 for k in old])
    after = F.conv3d(image, pad_kernel(kernel, new), stride=stride, padding=[k // 2 for k in new])
    assert torch.allclose(before, after, atol=1e-5)


@pytest.mark.parametrize("size", [(1, 3, 3), (4, 3, 3)])
def test_kernels_that_would_lose_weights_are_refused(size):
    with pytest.raises(ValueError, match="cannot be padded"):
        pad_kernel(torch.zeros(1, 1, 3, 3, 3), size)


def test_larger_tokens_answer_an_enlarged_image_exactly():
    image, kernel = torch.randn(2, 3, 4, 8, 4), torch.randn(5, 3, 2, 4, 4)
    larger = resize_token_kernel(kernel, (4, 8, 4))
    patches = image.unfold(2, 2, 2).unfold(3, 4, 4).unfold(4, 4, 4)  # (B, C, z, y, x, 2, 4, 4)
    flat = patches.permute(0, 2, 3, 4, 1, 5, 6, 7).reshape(-1, 3, 2, 4, 4)
    enlarged = F.interpolate(
        flat, size=(4, 8, 4), mode="trilinear"
    )  # each patch on its own, as the rule is for patches
    before = F.conv3d(flat, kernel, stride=(2, 4, 4))
    after = F.conv3d(enlarged, larger, stride=(4, 8, 4))
    assert torch.allclose(before, after, atol=1e-4)


def test_smaller_tokens_answer_images_of_constant_blocks_exactly():
    blocks, kernel = torch.randn(2, 3, 2, 4, 4), torch.randn(5, 3, 4, 8, 4)
    image = blocks.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.allclose(F.conv3d(image, kernel), F.conv3d(blocks, resize_token_kernel(kernel, (2, 4, 4))), atol=1e-4)


def test_smaller_tokens_add_up_blocks():
    kernel = torch.arange(4.0).reshape(1, 1, 1, 1, 4)
    assert resize_token_kernel(kernel, (1, 1, 2)).flatten().tolist() == pytest.approx([1.0, 5.0])
    assert torch.equal(resize_token_kernel(kernel, (1, 1, 4)), kernel)
