"""Pairs for registration: the field between two views is the one that their voxels show."""

from dataclasses import replace

import blosc2
import numpy as np
import pytest
import torch
from tiny_dataset import write_dataset

from nnssl_ext.data.cases import list_cases
from nnssl_ext.data.loader import make_loader
from nnssl_ext.records import Case
from nnssl_ext.registration.smoothness import jacobian_determinant
from nnssl_ext.registration.warp import warp
from nnssl_ext.views.cut import cut_views
from nnssl_ext.views.recipes import NO_INTENSITY
from nnssl_ext.views.registration_pairs import RegistrationPairs, drawn_warp, known_displacement, to_the_middle_of
from nnssl_ext.views.warps import INJECTIVE, WarpSettings, smooth_displacement

CPU = torch.device("cpu")
SIZE = (16, 16, 16)


@pytest.mark.parametrize("control", [(4.0, 4.0, 4.0), (3.0, 8.0, 8.0), (12.0, 12.0, 12.0)])
def test_the_strongest_warps_stay_within_their_bound_and_never_fold(control):
    for seed in range(3):
        field = smooth_displacement((20, 24, 18), control, 1.0, seed)
        assert (field.abs().flatten(1).amax(1) <= INJECTIVE * torch.tensor(control)).all()
        assert field.abs().max() > 0.3 * INJECTIVE * min(control)
        assert jacobian_determinant(field, margin=1).min() > 0
    assert torch.equal(field, smooth_displacement((20, 24, 18), control, 1.0, 2))
    assert smooth_displacement((20, 24, 18), control, 0.0, 2).abs().max() == 0


def test_spline_weights_add_up_to_one():
    """Control points that all move alike move everything alike."""
    from nnssl_ext.views.warps import _spline_weights

    for step in (1.7, 4.0, 30.0):
        torch.testing.assert_close(_spline_weights(21, step).sum(1), torch.ones(21))


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


def test_thick_slices_are_warped_alike_in_mm(tmp_path):
    case = Case("thick", tmp_path, 1, (20, 64, 64), (4.0, 1.0, 1.0))
    policy = RegistrationPairs((16, 48, 48), warp=WarpSettings(control=(16.0, 16.0), strength=(1.0, 1.0)))
    draws = policy.draw(case, np.random.default_rng(0), 0.5)
    assert draws[0].facts["warp_control"] == pytest.approx(16)
    assert set(draws[0].facts) == {"warp_control", "warp_strength", "warp_seed"}
    assert draws[1].intensity == {} and np.array_equal(draws[1].affine[:3, :3], np.eye(3))
