"""Affines: turns by hand, physical distances, and the voxels that interpolation needs."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnssl_ext.geometry.affines import bounding_box, is_integer, quarter_turns, rotation, view_to_case

angle = st.floats(-180, 180)
angles = st.tuples(angle, angle, angle)


def all_voxels(size):
    return np.array(list(itertools.product(*map(range, size))), float)


def mapped(affine, points):
    return points @ affine[:3, :3].T + affine[:3, 3]


@pytest.mark.parametrize(
    ("degrees", "start", "end"),
    [
        ((90, 0, 0), (0, 1, 0), (0, 0, 1)),  # about z: y goes to x
        ((0, 90, 0), (1, 0, 0), (0, 0, 1)),  # about y: z goes to x
        ((0, 0, 90), (1, 0, 0), (0, 1, 0)),  # about x: z goes to y
    ],
)
def test_quarter_turns(degrees, start, end):
    np.testing.assert_allclose(rotation(degrees) @ start, end, atol=1e-12)


@given(angles)
def test_rotation_is_a_rotation_and_keeps_its_axis(degrees):
    turn = rotation(degrees)
    np.testing.assert_allclose(turn @ turn.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(turn) == pytest.approx(1)
    np.testing.assert_allclose(rotation((degrees[0], 0, 0))[0], (1, 0, 0), atol=1e-12)


def test_plain_crop_is_exactly_its_shift():
    affine = view_to_case((4, 5, 6), (10 + 1.5, 20 + 2.0, 30 + 2.5))
    np.testing.assert_array_equal(mapped(affine, all_voxels((4, 5, 6))), np.add(all_voxels((4, 5, 6)), (10, 20, 30)))


def test_flip_reverses_exactly_its_axes():
    affine = view_to_case((4, 5, 6), (11.5, 22, 32.5), flips=(True, False, True))
    np.testing.assert_array_equal(mapped(affine, np.array([[0.0, 0, 0], [3, 4, 5]])), [[13, 20, 35], [10, 24, 30]])


@given(st.tuples(*[st.integers(0, 3)] * 3), st.tuples(*[st.booleans()] * 3), st.tuples(*[st.floats(0.5, 2)] * 3))
def test_quarter_turns_are_rotations_and_leave_the_box_of_a_cube(counts, flips, zoom):
    quarters = quarter_turns(counts)
    np.testing.assert_allclose(quarters, rotation([90 * count for count in counts]), atol=1e-12)
    size, centre = (8, 8, 8), (20.5, 21.0, 19.25)
    turned, plain = (view_to_case(size, centre, flips=flips, quarters=q, zoom=zoom) for q in (quarters, None))
    corners = [mapped(affine, all_voxels(size)) for affine in (turned, plain)]
    for extreme in (np.min, np.max):
        np.testing.assert_allclose(extreme(corners[0], 0), extreme(corners[1], 0), atol=1e-9)
    assert np.abs(np.linalg.det(turned)) == pytest.approx(np.prod(zoom))


@given(angles, st.floats(0.5, 2), st.tuples(*[st.booleans()] * 3))
def test_centre_stays_and_distances_in_mm_scale_with_the_zoom(degrees, zoom, flips):
    spacing, size, centre = np.array([5.0, 0.8, 1.1]), (7, 9, 11), np.array([20.3, 40, 31])
    affine = view_to_case(size, centre, degrees=degrees, zoom=(zoom,) * 3, flips=flips, spacing=spacing)
    np.testing.assert_allclose(mapped(affine, (np.array(size) - 1)[None] / 2), centre[None], atol=1e-9)
    a, b = np.array([[0.0, 0, 0]]), np.array([[6.0, 3, 10]])
    before = np.linalg.norm((b - a) * spacing)
    after = np.linalg.norm((mapped(affine, b) - mapped(affine, a)) * spacing)
    assert after == pytest.approx(zoom * before)


@given(angles, st.floats(0.5, 2), st.tuples(*[st.floats(-5, 5)] * 3))
def test_bounding_box_holds_every_neighbour_of_every_point(degrees, zoom, shift):
    size = (3, 4, 5)
    affine = view_to_case(size, shift, degrees=degrees, zoom=(zoom,) * 3)
    points, box = mapped(affine, all_voxels(size)), bounding_box(affine, size)
    assert (np.floor(points + 1e-6) >= box.lower).all() and (np.ceil(points - 1e-6) < box.upper).all()
    assert (points.min(0) < np.array(box.lower) + 1).all() and (points.max(0) > np.array(box.upper) - 2).all()


def test_bounding_box_of_a_plain_crop_is_the_crop():
    box = bounding_box(view_to_case((4, 5, 6), (11.5, 22, 32.5), flips=(True, False, True)), (4, 5, 6))
    assert (box.lower, box.upper) == ((10, 20, 30), (14, 25, 36))


def test_only_shifts_flips_and_quarter_turns_of_whole_voxels_are_integer():
    crop = {"size": (4, 5, 6), "centre": (11.5, 22, 32.5)}
    assert is_integer(view_to_case(**crop)) and is_integer(view_to_case(**crop, flips=(True, True, False)))
    assert is_integer(view_to_case((4, 6, 6), (11.5, 22.5, 32.5), quarters=quarter_turns((1, 0, 0))))
    assert not is_integer(view_to_case((4, 5, 6), (11, 22, 32), quarters=quarter_turns((1, 0, 0))))  # half voxels
    assert not is_integer(view_to_case((4, 5, 6), (11.25, 22, 32.5)))
    assert not is_integer(view_to_case(**crop, degrees=(1, 0, 0)))
    assert not is_integer(view_to_case(**crop, zoom=(2, 2, 2)))
