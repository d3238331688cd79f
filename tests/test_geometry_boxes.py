"""Boxes against counting voxels."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnssl_ext.geometry.boxes import Box, clip, hull, intersection, iou

SIDE = 8
size = st.tuples(*[st.integers(1, SIDE)] * 3)


@st.composite
def boxes(draw):
    lower = draw(st.tuples(*[st.integers(0, SIDE - 1)] * 3))
    return Box(lower, tuple(draw(st.integers(a, SIDE)) for a in lower))


def voxels(box: Box) -> np.ndarray:
    inside = np.zeros((SIDE, SIDE, SIDE), bool)
    inside[tuple(map(slice, box.lower, box.upper))] = True
    return inside


@given(boxes(), boxes())
def test_intersection_and_iou_equal_counted_voxels(a, b):
    shared, union = (voxels(a) & voxels(b)).sum(), (voxels(a) | voxels(b)).sum()
    assert intersection(a, b).volume == shared
    assert iou(a, b) == pytest.approx(shared / union if union else 0.0)
    assert iou(a, b) == iou(b, a)


@given(boxes(), boxes())
def test_hull_holds_both_and_no_face_can_move_inwards(a, b):
    held = hull(a, b)
    assert held.lower == tuple(np.minimum(a.lower, b.lower)) and held.upper == tuple(np.maximum(a.upper, b.upper))


def test_iou_of_known_boxes():
    cube = Box((0, 0, 0), (96, 96, 96))
    assert iou(cube, cube) == 1
    assert iou(cube, Box((48, 0, 0), (144, 96, 96))) == pytest.approx(1 / 3)
    assert iou(cube, Box((96, 0, 0), (192, 96, 96))) == 0  # touching


@given(st.tuples(*[st.integers(-12, 12)] * 3), size, size)
def test_clip_stays_inside_the_volume_and_is_never_empty(lower, length, shape):
    clipped = clip(Box(lower, tuple(a + n for a, n in zip(lower, length, strict=True))), shape)
    assert clipped.volume > 0
    assert all(0 <= a < b <= n for a, b, n in zip(clipped.lower, clipped.upper, shape, strict=True))
    for axis in range(3):
        wanted = set(range(lower[axis], lower[axis] + length[axis])) & set(range(shape[axis]))
        if wanted:
            assert set(range(clipped.lower[axis], clipped.upper[axis])) == wanted
