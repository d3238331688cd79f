"""Token, patch and crop sizes against values worked out by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnssl_ext.planners.sizes import initial_patch, local_crop, round_up, shrink, token_size, token_strides


@pytest.mark.parametrize(
    ("spacing", "shape", "edge", "token"),
    [
        ((1.0, 1.0, 1.0), (128, 128, 128), 8, (8, 8, 8)),
        ((1.0, 1.0, 1.0), (64, 64, 64), 8, (8, 8, 8)),  # exactly 512 tokens
        ((1.0, 1.0, 1.0), (36, 50, 35), 8, (4, 4, 4)),  # 5 * 7 * 5 = 175 tokens of 8
        ((5.0, 1.0, 1.0), (24, 256, 256), 8, (2, 8, 8)),  # 10 x 8 x 8 mm
        ((2.5, 1.0, 1.0), (60, 256, 256), 8, (4, 8, 8)),  # 10 x 8 x 8 mm
        ((12.0, 1.0, 1.0), (20, 256, 256), 8, (1, 8, 8)),  # 12 x 8 x 8 mm
        ((5.0, 1.0, 1.0), (13, 64, 64), 8, (1, 4, 4)),  # 7 * 8 * 8 = 448 tokens of 2x8x8; now 5 x 4 x 4 mm
        ((0.7, 0.8, 0.7), (200, 512, 512), 8, (8, 8, 8)),
    ],
)
def test_tokens_are_near_isotropic_and_not_too_few(spacing, shape, edge, token):
    found, reason = token_size(spacing, shape, edge)
    assert found == token
    lengths = [t * s for t, s in zip(found, spacing, strict=True) if t > 1]
    assert max(lengths) / min(lengths) < 2
    assert reason


def test_token_strides_halve_coarse_axes_last():
    assert token_strides((8, 8, 8)) == [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]]
    assert token_strides((2, 8, 8)) == [[1, 1, 1], [1, 2, 2], [1, 2, 2], [2, 2, 2]]
    assert token_strides((4, 4, 4)) == [[1, 1, 1], [2, 2, 2], [2, 2, 2]]
    assert token_strides((1, 4, 4)) == [[1, 1, 1], [1, 2, 2], [1, 2, 2]]


@given(st.tuples(*[st.sampled_from([1, 2, 4, 8, 16])] * 3).filter(lambda t: max(t) > 1))
def test_strides_multiply_to_the_token(token):
    strides = token_strides(token)
    assert strides[0] == [1, 1, 1]
    assert tuple(math.prod(axis) for axis in zip(*strides, strict=True)) == token
    assert all(max(stride) == 2 for stride in strides[1:])


def test_initial_patch_follows_spacing_and_stays_within_the_median_case():
    assert initial_patch((1, 1, 1), (36, 50, 35), (4, 4, 4)) == (36, 52, 36)
    assert initial_patch((1, 1, 1), (1000, 1000, 1000), (8, 8, 8)) == (256, 256, 256)
    # 8 x 1 x 1 mm: edges in the ratio 1:8:8 with the volume of 256 cubed, 64 x 512 x 512
    assert initial_patch((8, 1, 1), (1000, 1000, 1000), (1, 8, 8)) == (64, 512, 512)


def test_shrink_keeps_the_shape_of_the_median_case():
    small = shrink((256, 128, 128), (256, 128, 128), (8, 8, 8), lambda p: math.prod(p) <= 128 * 64 * 64)
    assert math.prod(small) <= 128 * 64 * 64
    assert 1.7 < small[0] / small[1] < 2.3
    assert shrink((64, 64, 64), (64, 64, 64), (8, 8, 8), lambda p: False) == (16, 16, 16)  # two tokens are the least


def test_local_crop_is_half_in_multiples():
    assert local_crop((96, 96, 96), (8, 8, 8)) == (48, 48, 48)
    assert local_crop((36, 52, 36), (4, 4, 4)) == (20, 28, 20)
    assert local_crop((16, 128, 128), (16, 32, 32)) == (16, 64, 64)
    assert local_crop((16, 32, 24), (16, 16, 16)) == (16, 32, 16)  # a single place could not be normalised
    assert local_crop((16, 16, 16), (16, 16, 16)) == (16, 16, 16)  # there are no two


@given(st.tuples(*[st.floats(0.1, 500)] * 3), st.tuples(*[st.integers(1, 32)] * 3))
def test_round_up_is_the_next_multiple(size, divisor):
    for edge, rounded, d in zip(size, round_up(size, divisor), divisor, strict=True):
        assert rounded % d == 0 and rounded >= edge and rounded - edge < d + 1e-9
