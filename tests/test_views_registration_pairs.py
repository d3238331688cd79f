"""Pairs for registration: the field between two views is the one that their voxels show."""

import math
from dataclasses import replace

import blosc2
import numpy as np
import pytest
import torch
from tiny_dataset import write_dataset

from nnssl_ext.data.cases import list_cases
from nnssl_ext.data.loader import make_loader
from nnssl_ext.records import Case, View
from nnssl_ext.registration.smoothness import jacobian_determinant
from nnssl_ext.registration.warp import warp
from nnssl_ext.views.cut import cut_views
from nnssl_ext.views.recipes import NO_INTENSITY
from nnssl_ext.views.registration_pairs import RegistrationPairs, drawn_warp, known_displacement, to_the_middle_of
from nnssl_ext.views.warps import INJECTIVE, WarpSettings, _spline_weights, smooth_displacement

CPU = torch.device("cpu")
SIZE = (16, 16, 16)


@pytest.mark.parametrize("control", [(4.0, 4.0, 4.0), (3.0, 8.0, 8.0), (12.0, 12.0, 12.0)])
def test_the_strongest_warps_stay_within_their_bound_and_never_fold(control):
    for seed in range(3):
        field = smooth_displacement((20, 24, 18), control, 1.0, seed)
        assert (field.abs().flatten(1).amax(1) <= torch.tensor(control) / 2.48).all()  # Choi & Lee's bound
        assert field.abs().max() > 0.3 * min(control) / 2.48
        assert jacobian_determinant(field, margin=1).min() > 0
    assert torch.equal(field, smooth_displacement((20, 24, 18), control, 1.0, 2))
    assert smooth_displacement((20, 24, 18), control, 0.0, 2).abs().max() == 0


def test_spline_weights_add_up_to_one():
    """Control points that all move alike move everything alike."""
    for step in (1.7, 4.0, 30.0):
        torch.testing.assert_close(_spline_weights(21, step).sum(1), torch.ones(21))


def test_the_bound_is_where_the_worst_control_points_begin_to_fold():
    """Of control points within +-s the worst Jacobian is 1 - s * max over places of sum_k |sum_j d_j w_k| (Choi & Lee)."""
    weights = _spline_weights(101, 100.0)  # one cell of the control grid, finely
    places = torch.arange(2, 99, 6)
    w, d = weights[places], torch.gradient(weights, dim=0)[0][places] * 100
    along = [[d if axis == other else w for other in range(3)] for axis in range(3)]
    grown = sum(torch.einsum("ai,bj,ck->abcijk", *factors) for factors in along)
    assert 0.97 < INJECTIVE * grown.abs().sum((3, 4, 5)).max().item() <= 1


@pytest.fixture
def cases(tmp_path):
    folder = write_dataset(tmp_path) / "tiny_3d_fullres"
    return list_cases(folder, (1.0, 1.0, 1.0))


def views_of(cases, policy, batch=4):
    loader = make_loader(cases, policy, seed=0, start_step=0, steps=1, batch_size=batch)
    return cut_views(next(iter(loader)), CPU)


def test_what_was_deformed_is_found_again_where_the_known_field_points(cases):
    policy = RegistrationPairs(SIZE, intensity=NO_INTENSITY, warp=WarpSettings(control=(8.0, 12.0)))
    fixed, moving = views_of(cases, policy)
    deformation = drawn_warp(fixed)
    image = warp(fixed.voxels, deformation)
    known, inside = known_displacement(fixed, moving, deformation)
    assert 0.2 < inside.float().mean() < 1 and known.abs().mean() > 0.5
    found = warp(moving.voxels, known)
    inner = inside & torch.nn.functional.pad(torch.ones(10, 10, 10, dtype=torch.bool), (3,) * 6)

    def difference(other):
        return ((image - other)[:, 0][inner] ** 2).mean().sqrt()

    assert difference(found) < 0.12  # linear interpolation of smooth noise with std 1, two and three times
    assert difference(moving.voxels) > 5 * difference(found)


def test_labels_come_along_when_asked_for(cases):
    policy = RegistrationPairs(SIZE, intensity=NO_INTENSITY)
    assert all(view.labels is None for view in views_of(cases, policy))
    fixed, moving = views_of(cases, replace(policy, labels=True))
    for view in (fixed, moving):
        bright = view.voxels[:, 0] > 0.5  # the tiny dataset's label
        agreement = (bright == (view.labels > 0)).float().mean()
        assert agreement > (0.999 if view is moving else 0.93)
    assert fixed.labels.any() and set(moving.labels.unique().tolist()) == {0, 1}


def test_voxels_outside_of_nnunets_mask_are_background(cases):
    case = cases[0]
    path = case.folder / f"{case.identifier}_seg.b2nd"
    path.unlink()
    blosc2.asarray(np.full((1, *case.shape), -1, np.int8), urlpath=str(path))
    _, moving = views_of([case], RegistrationPairs(SIZE, labels=True), batch=1)
    assert moving.labels.abs().max() == 0


def test_middles_of_cases_meet(cases):
    _, moving = views_of(cases, RegistrationPairs((8, 8, 8)))
    offset = to_the_middle_of(moving, 0, 1)
    middles = [(moving.case_shape[row] - 1) / 2 - moving.affine[row, :3, 3] for row in (0, 1)]
    torch.testing.assert_close(middles[0] + offset, middles[1])


def view_of(affine, spacing=(1.0, 1.0, 1.0), applied=()) -> View:
    """An empty view of 6 x 7 x 8 voxels, of a case of 20 x 20 x 20."""
    return View(
        voxels=torch.zeros(1, 1, 6, 7, 8),
        affine=affine[None].float(),
        case_shape=torch.tensor([(20, 20, 20)]),
        spacing=torch.tensor([spacing]),
        cases=("a",),
        applied=applied,
    )


def test_thick_slices_are_warped_alike_in_mm():
    """8 voxels of the finest axis between control points: 8 mm, which is 2 slices of 4 mm."""
    facts = {"warp_control": 8.0, "warp_strength": 1.0, "warp_seed": 5.0}
    view = view_of(torch.eye(4), spacing=(4.0, 1.0, 2.0), applied=(facts,))
    torch.testing.assert_close(drawn_warp(view)[0], smooth_displacement((6, 7, 8), (2.0, 8.0, 4.0), 1.0, 5))


def test_the_known_displacement_goes_through_the_case_and_ends_count_where_all_grids_have_them():
    """Voxel by voxel: to the fixed view's voxel, to the case, and from there to the moving view."""
    turned, shifted = torch.eye(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    cosine, sine = math.cos(math.radians(30)), math.sin(math.radians(30))
    turned[1:3, 1:3] = 1.2 * torch.tensor([[cosine, -sine], [sine, cosine]])
    turned[:3, 3] = torch.tensor([2.0, 3.0, -1.0])
    shifted[:3, 3] = torch.tensor([1.0, 0.0, -2.0])  # the moving view begins outside of the case along x
    deformation = torch.randn(1, 3, 6, 7, 8, generator=torch.Generator().manual_seed(0)) * 2
    known, inside = known_displacement(view_of(turned), view_of(shifted), deformation)

    def within(place, shape):
        return bool(((place >= -0.5) & (place <= torch.tensor(shape) - 0.5)).all())

    seen = set()
    for voxel in np.ndindex(6, 7, 8):
        here = torch.tensor(voxel, dtype=torch.float64)
        source = here + deformation[(0, slice(None), *voxel)].double()
        case = turned @ torch.cat((source, torch.ones(1)))
        end = torch.linalg.solve(shifted, case)[:3]
        torch.testing.assert_close(known[(0, slice(None), *voxel)].double(), end - here, atol=1e-4, rtol=0)
        parts = within(end, (6, 7, 8)), within(source, (6, 7, 8)), within(case[:3], (20, 20, 20))
        assert bool(inside[(0, *voxel)]) == all(parts)
        seen.add(parts)
    assert {(True, True, True), (True, False, True), (True, True, False), (False, True, True)} <= seen


def test_centres_are_moved_apart_by_the_share_of_the_crop_that_was_asked_for(tmp_path):
    case, size = Case("a", tmp_path, 1, (40, 60, 80), (1.0, 1.0, 1.0)), np.array([16, 24, 32])
    policy, rng = RegistrationPairs((16, 24, 32), shift=0.25), np.random.default_rng(0)
    away = []
    for _ in range(200):
        draws = policy.draw(case, rng, 0.5)
        assert draws[1].intensity == {} and np.array_equal(draws[1].affine[:3, :3], np.eye(3))  # a plain crop
        centres = [draw.affine[:3] @ [*(size - 1) / 2, 1] for draw in draws]
        away.append((centres[0] - centres[1]) / size)
    assert np.abs(away).max() <= 0.25 + 1e-9 and (np.ptp(away, axis=0) > 0.45).all()
