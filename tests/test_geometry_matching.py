"""Where views lie in their case and in each other."""

import numpy as np
import pytest
import torch

from nnssl_ext.geometry.affines import view_to_case
from nnssl_ext.geometry.boxes import Box, intersection
from nnssl_ext.geometry.matching import (
    case_coordinates,
    coordinates,
    covisible,
    inside_case,
    matched_cells,
    matched_coordinates,
)
from nnssl_ext.records import View


def view(*affines: np.ndarray, size=(4, 5, 6), shape=(20, 30, 40), cases=None) -> View:
    b = len(affines)
    return View(
        voxels=torch.zeros(b, 1, *size),
        affine=torch.from_numpy(np.stack(affines)).float(),
        case_shape=torch.tensor(shape).expand(b, 3),
        spacing=torch.ones(b, 3),
        cases=cases or tuple("abcdef"[:b]),
    )


def crop(lower, size=(4, 5, 6), **change):
    return view_to_case(size, np.array(lower) + (np.array(size) - 1) / 2, **change)


def test_coordinates_equal_matrix_products():
    affines = np.stack(
        [crop((1, 2, 3), degrees=(10, 20, 30), zoom=(1.2, 0.8, 1)), crop((4, 4, 4), flips=(True, False, False))]
    )
    found = coordinates(torch.from_numpy(affines), (4, 5, 6))
    for b, z, y, x in [(0, 0, 0, 0), (0, 3, 1, 5), (1, 2, 4, 0), (1, 3, 4, 5)]:
        np.testing.assert_allclose(found[b, z, y, x], (affines[b] @ (z, y, x, 1))[:3], atol=1e-12)


def test_inside_case_counts_the_voxels_of_the_overlap():
    inside = inside_case(view(crop((-1, -2, 0)), crop((18, 10, 39))))
    assert inside.shape == (2, 1, 4, 5, 6)
    assert inside.sum((1, 2, 3, 4)).tolist() == [3 * 3 * 6, 2 * 5 * 1]
    assert not inside[0, 0, 0].any() and inside[0, 0, 1:, 2:].all()


@pytest.mark.parametrize("other", [(3, 3, 3), (6, 2, 8), (0, 0, 0), (10, 10, 10)])
def test_covisible_voxels_of_crops_are_those_of_the_box_intersection(other):
    a, b = Box((4, 4, 4), (8, 9, 10)), Box(other, tuple(np.add(other, (4, 5, 6)).tolist()))
    seen = covisible(view(crop(a.lower)), view(crop(b.lower)))
    assert int(seen.sum()) == intersection(a, b).volume


def test_a_point_outside_the_case_is_not_covisible():
    assert covisible(view(crop((-2, 0, 0))), view(crop((-2, 0, 0)))).sum() == 2 * 5 * 6


def test_matched_voxels_lie_at_the_same_case_voxel():
    a = view(crop((3, 4, 5), degrees=(10, -20, 5), zoom=(1.1, 0.9, 1.3)))
    b = view(crop((5, 3, 6), degrees=(-15, 4, 40), flips=(True, False, True)))
    matched = matched_coordinates(a, b)[0].double()
    back = matched @ b.affine[0, :3, :3].double().T + b.affine[0, :3, 3].double()
    np.testing.assert_allclose(back, case_coordinates(a)[0].double(), atol=1e-4)


def test_a_view_matches_itself_voxel_by_voxel():
    a = view(crop((3, 4, 5), degrees=(10, -20, 5)))
    np.testing.assert_allclose(matched_coordinates(a, a)[0], coordinates(torch.eye(4)[None], (4, 5, 6))[0], atol=1e-5)


def test_views_of_different_cases_do_not_match():
    with pytest.raises(ValueError, match="different cases"):
        matched_coordinates(view(crop((0, 0, 0)), cases=("a",)), view(crop((0, 0, 0)), cases=("b",)))


def test_cells_of_crops_shifted_by_whole_cells_match_one_to_one():
    a, b = view(crop((0, 0, 0), (8, 12, 6)), size=(8, 12, 6)), view(crop((4, 6, 0), (8, 12, 6)), size=(8, 12, 6))
    places, valid = matched_cells(a, b, (4, 3, 2))
    assert places.shape == (1, 2, 4, 3, 3)
    np.testing.assert_allclose(places[0, 1, 3, 2], (0, 1, 2), atol=1e-5)
    assert valid[0].nonzero().tolist() == [[1, y, x] for y in (2, 3) for x in (0, 1, 2)]


def test_cell_centres_match_where_their_points_of_the_case_are_equal():
    stride = np.array((2, 3, 2))
    size = (8, 9, 10)
    a = view(crop((3, 4, 5), size, degrees=(10, -20, 5), zoom=(1.1, 0.9, 1.2)), size=size)
    b = view(crop((5, 3, 6), size, degrees=(-15, 4, 40), flips=(True, False, True)), size=size)
    places, valid = matched_cells(a, b, (2, 3, 2))
    centres = np.stack(np.meshgrid(*map(np.arange, valid.shape[1:]), indexing="ij"), -1) * stride + (stride - 1) / 2
    in_case = centres @ a.affine[0, :3, :3].numpy().T + a.affine[0, :3, 3].numpy()
    in_b = np.linalg.solve(
        b.affine[0].numpy(), np.concatenate([in_case, np.ones_like(in_case[..., :1])], -1)[..., None]
    )
    in_b = (in_b[..., :3, 0] - (stride - 1) / 2) / stride
    np.testing.assert_allclose(places[0], in_b, atol=1e-4)
    wanted = ((in_b >= 0) & (in_b <= np.array(valid.shape[1:]) - 1)).all(-1)
    np.testing.assert_array_equal(valid[0], wanted & (in_case >= 0).all(-1) & (in_case <= (19, 29, 39)).all(-1))
    assert 0 < valid.sum() < valid.numel()


def test_a_cell_centred_outside_the_case_does_not_match():
    a = view(crop((-3, 0, 0), (8, 8, 8)), size=(8, 8, 8))
    assert matched_cells(a, a, (4, 4, 4))[1].sum() == 1 * 2 * 2  # centres at -1.5 and 2.5
    with pytest.raises(ValueError, match="different cases"):
        matched_cells(a, view(crop((0, 0, 0), (8, 8, 8)), size=(8, 8, 8), cases=("b",)), (4, 4, 4))
