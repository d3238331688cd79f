"""Multi-crop: shares, proportions and places of the views, their masks, and that all are cut where they say."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from preprocessed_cases import coordinate_volume, save_case
from scipy import stats

from nnssl_ext.contracts import ViewDraw
from nnssl_ext.data.cases import list_cases
from nnssl_ext.data.loader import make_loader
from nnssl_ext.errors import NnsslError
from nnssl_ext.geometry.affines import bounding_box
from nnssl_ext.geometry.boxes import hull
from nnssl_ext.geometry.matching import case_coordinates
from nnssl_ext.records import Case
from nnssl_ext.views.cut import cut_views
from nnssl_ext.views.masks import TokenMaskSettings
from nnssl_ext.views.multi_crop import GLOBAL_SCALE, LOCAL_SCALE, CropScale, MultiCrop
from nnssl_ext.views.policies import IntensitySettings, SpatialSettings
from nnssl_ext.views.recipes import DINO_INTENSITY, NO_INTENSITY, STILL

CPU = torch.device("cpu")
SMALL = MultiCrop((16, 24, 20), (8, 12, 8), locals_=4, field_of_view=2.0)


def case(shape, spacing=(1.0, 1.0, 1.0)) -> Case:
    return Case("x", Path(), 1, shape, spacing)


def draws(policy: MultiCrop, of: Case, number: int) -> list[tuple[ViewDraw, ...]]:
    return [policy.draw(of, np.random.default_rng([3, n]), (n + 0.5) / number) for n in range(number)]


def extents(views: list[ViewDraw]) -> np.ndarray:
    """Voxels of the case that each view shows along z, y, x."""
    return np.array([np.abs(view.affine[:3, :3]) @ view.size for view in views])


def test_globals_come_first_then_locals():
    (views,) = draws(replace(SMALL, globals_=3, locals_=5), case((40, 50, 60)), 1)
    assert [view.size for view in views] == [(16, 24, 20)] * 3 + [(8, 12, 8)] * 5
    assert all(view.mask is None and view.intensity == {} for view in views)


@pytest.mark.parametrize(
    ("spacing", "slices"), [((1.0, 1.0, 1.0), 0), ((3.0, 0.8, 0.8), 0), ((1.0, 1.0, 1.4), 2), ((1.0, 2.0, 2.0), 1)]
)
@pytest.mark.parametrize("index", [0, -1])
def test_shares_of_plane_and_slices_are_uniform_over_their_ranges(spacing, slices, index):
    of = case((30, 44, 36), spacing)  # smaller than 2 global views: the field is the whole case
    policy = replace(SMALL, globals_=1, locals_=1)
    found = extents([views[index] for views in draws(policy, of, 400)]) / of.shape
    plane = [axis for axis in range(3) if axis != slices]
    scale = GLOBAL_SCALE if index == 0 else LOCAL_SCALE
    for values, (low, high) in ((found[:, plane].prod(1), scale.area), (found[:, slices], scale.length)):
        assert stats.kstest((values - low) / (high - low), "uniform").pvalue > 1e-3


def test_mean_volumes_are_those_measured_of_3dino():
    policy = MultiCrop((96,) * 3, (48,) * 3, field_of_view=10.0)
    sets = draws(policy, case((96, 256, 256)), 150)
    shares = [extents(list(views)).prod(1) / (96 * 256 * 256) for views in sets]
    assert np.mean([s[:2] for s in shares]) == pytest.approx(0.54, abs=0.04)
    assert np.mean([s[2:] for s in shares]) == pytest.approx(0.11, abs=0.01)


def test_proportions_in_the_plane_are_kept_to_the_aspect_in_mm():
    """Views of 24 x 20 voxels and a case of the same proportions: nothing is clipped but by the case itself."""
    policy = MultiCrop((16, 24, 20), (8, 12, 10), spatial=STILL)
    sets = draws(policy, case((24, 96, 80), (2.0, 1.0, 1.5)), 60)
    zooms = np.array([np.diag(view.affine)[:3] for views in sets for view in views])
    ratios = zooms[:, 1] / zooms[:, 2]
    assert 0.9 - 1e-9 <= ratios.min() < 0.91 and 1.1 < ratios.max() <= 1 / 0.9 + 1e-9
    assert stats.kstest((np.log(ratios) / -np.log(0.9) + 1) / 2, "uniform").pvalue > 1e-3


def test_a_field_too_narrow_for_the_aspect_keeps_the_share_and_the_views_inside():
    policy = MultiCrop((16, 16, 16), (8, 8, 8), globals_=1, locals_=0, spatial=STILL)
    of = case((16, 20, 80))
    for (view,) in draws(policy, of, 100):
        z, y, x = np.diag(view.affine)[:3] * 16
        assert 0.48 <= y * x / (20 * 24) <= 1 + 1e-9 and y <= 20 + 1e-9 and x <= 24 + 1e-9 and z <= 16
        assert (view.affine[:3, 3] - (np.diag(view.affine)[:3] - 1) / 2 >= -1e-9).all()


@pytest.mark.parametrize("shape", [(35, 50, 36), (12, 20, 14), (90, 100, 300)])
def test_all_views_lie_in_one_field_inside_the_case(shape):
    policy = MultiCrop((40, 56, 40), (20, 28, 20), field_of_view=1.5, spatial=SpatialSettings(rotation=0.0, zoom=0.0))
    corners = []
    for views in draws(policy, case(shape), 50):
        boxes = [bounding_box(view.affine, view.size) for view in views]
        whole = boxes[0]
        for box in boxes[1:]:
            whole = hull(whole, box)
        # Interpolation at the outermost view voxels reaches at most one voxel beyond what the view shows.
        assert min(whole.lower) >= -1 and all(u <= n + 1 for u, n in zip(whole.upper, shape, strict=True))
        assert all(n <= 1.5 * g + 3 for n, g in zip(whole.shape, (40, 56, 40), strict=True))
        corners.append(whole.lower)
    assert shape[2] < 300 or np.ptp(corners, axis=0)[2] > 200  # a long case: the field is anywhere along it


@pytest.mark.parametrize("shape", [(35, 50, 36), (12, 60, 60), (1, 40, 40)])
def test_enlarged_views_do_not_mix_in_the_padding_around_the_case(shape):
    policy = MultiCrop((1, 32, 32) if shape[0] == 1 else (32, 32, 32), (min(shape[0], 16), 16, 16), spatial=STILL)
    for views in draws(policy, case(shape), 40):
        for view in views:
            first, zoom = view.affine[:3, 3], np.diag(view.affine)[:3]
            last = first + zoom * (np.array(view.size) - 1)
            fits = zoom * view.size + np.maximum(0, 1 - zoom) <= shape  # else centred, and short of a voxel by 1 - zoom
            assert (first[fits] >= -1e-9).all() and (last[fits] <= np.array(shape)[fits] - 1 + 1e-9).all()
            assert (np.maximum(-first, last - shape + 1) <= np.maximum(0, 1 - zoom) / 2 + 1e-9).all()


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (5.0, 1.0, 1.2)])
def test_every_view_shows_the_place_its_affine_states(tmp_path, spacing):
    for number, shape in enumerate([(40, 44, 42), (12, 52, 36), (30, 18, 64)]):
        save_case(tmp_path, f"case_{number}", coordinate_volume(shape))
    spatial = SpatialSettings(rot90=(0.5,) * 3, rotation=0.5, zoom=0.3)
    policy = replace(SMALL, spatial=spatial, local_size=(12, 12, 12))
    for batch in make_loader(list_cases(tmp_path, spacing), policy, seed=5, start_step=0, steps=3, batch_size=3):
        views = cut_views(batch, CPU)
        assert [tuple(view.voxels.shape[2:]) for view in views] == [(16, 24, 20)] * 2 + [(12, 12, 12)] * 4
        for view in views:
            places = case_coordinates(view)
            inside = ((places >= 0) & (places <= view.case_shape[:, None, None, None] - 1)).all(-1)
            assert inside.float().mean() > 0.5
            torch.testing.assert_close(view.voxels.movedim(1, -1)[inside], places[inside], atol=1e-3, rtol=0)


def test_quarter_turns_happen_only_where_they_change_no_size(tmp_path):
    turned = SpatialSettings(flip=(0.0,) * 3, rot90=(1.0,) * 3, rotation=0.0, zoom=0.0)

    def matrices(size, spacing):
        policy = MultiCrop(size, size, globals_=1, locals_=0, spatial=turned)
        found = np.array([views[0].affine[:3, :3] for views in draws(policy, case((40, 40, 40), spacing), 60)])
        return (np.abs(found) > 1e-9).astype(int)

    assert len(np.unique(matrices((16, 16, 16), (1.0, 1.0, 1.0)), axis=0)) == 6  # all orders of the axes
    for size, spacing in (((16, 16, 16), (3.0, 1.0, 1.0)), ((8, 16, 16), (1.0, 1.0, 1.0))):
        only_in_plane = matrices(size, spacing)
        assert (only_in_plane[:, 0] == [1, 0, 0]).all() and len(np.unique(only_in_plane, axis=0)) == 2
    assert (matrices((8, 16, 16), (1.0, 1.0, 2.0)) == np.eye(3)).all()


def test_one_of_two_global_views_is_masked_and_no_local_one():
    policy = replace(SMALL, mask=TokenMaskSettings((4, 4, 4)))
    which = []
    for views in draws(policy, case((40, 50, 60)), 200):
        masks = [view.mask for view in views[:2]]
        assert all(mask is not None and mask.shape == (4, 6, 5) for mask in masks)
        assert all(view.mask is None for view in views[2:])
        (masked,) = [number for number, mask in enumerate(masks) if mask.any()]
        which.append(masked)
    assert np.mean(which) == pytest.approx(0.5, abs=0.12)


def test_masked_tokens_of_a_step_vary_little_and_masks_stack(tmp_path):
    """dino.md row 5. The largest total of any step: every ratio at the upper edge of its stratum."""
    save_case(tmp_path, "case", np.zeros((1, 40, 40, 40), np.float32))
    policy = MultiCrop((32, 32, 32), (8, 8, 8), locals_=1, mask=TokenMaskSettings((4, 4, 4), ratio=(0.1, 0.5)))
    size, cells = 8, 512
    loader = make_loader(list_cases(tmp_path, (1.0, 1.0, 1.0)), policy, seed=0, start_step=0, steps=12, batch_size=size)
    edges = np.linspace(0.1, 0.5, size + 1)
    totals = []
    for batch in loader:
        first, second, local = cut_views(batch, CPU)
        assert local.mask is None and first.mask.shape == second.mask.shape == (size, 8, 8, 8)
        shares = torch.stack([first.mask, second.mask]).flatten(2).sum(2).amax(0).sort().values.numpy()
        assert (shares >= (edges[:-1] * cells).astype(int)).all() and (shares <= edges[1:] * cells).all()
        totals.append(shares.sum())
    assert np.std(totals) < 0.2 * cells * 0.4 * np.sqrt(size / 12)  # a fifth of what independent ratios would give
    assert np.mean(totals) / (size * cells) == pytest.approx(0.3, abs=0.01)


def test_intensity_is_drawn_per_view_and_the_last_serves_all_locals():
    first, second, rest = (replace(NO_INTENSITY, **{name: 1.0}) for name in ("gamma", "gibbs", "blur"))
    (views,) = draws(replace(SMALL, intensity=(first, second, rest)), case((40, 50, 60)), 1)
    assert [set(view.intensity) for view in views] == [{"gamma"}, {"gibbs"}] + [{"blur"}] * 4
    (alike,) = draws(replace(SMALL, intensity=(first,)), case((40, 50, 60)), 1)
    assert all(set(view.intensity) == {"gamma"} for view in alike)
    strengths = {view.intensity["gamma"] for view in alike}
    assert len(strengths) == 6
    assert all(isinstance(recipe, IntensitySettings) for recipe in DINO_INTENSITY)


def test_views_of_one_size_cut_together_equal_views_cut_alone(tmp_path):
    save_case(tmp_path, "case", np.random.default_rng(0).random((2, 40, 44, 42), np.float32))
    policy = replace(SMALL, intensity=DINO_INTENSITY, mask=TokenMaskSettings((4, 4, 4)))
    (batch,) = make_loader(list_cases(tmp_path, (1.0,) * 3), policy, seed=1, start_step=0, steps=1, batch_size=3)
    together = cut_views(batch, CPU)
    for number, view in enumerate(together):
        (alone,) = cut_views(replace(batch, draws=tuple((sample[number],) for sample in batch.draws)), CPU)
        torch.testing.assert_close(view.voxels, alone.voxels, atol=1e-4, rtol=1e-4)
        assert torch.equal(view.affine, alone.affine) and view.applied == alone.applied
        assert (view.mask is None) == (number >= 2) == (alone.mask is None)


@pytest.mark.parametrize("scale", [{"area": (0.0, 0.5)}, {"area": (0.5, 1.2)}, {"length": (0.6, 0.5)}])
def test_impossible_scales_are_refused(scale):
    with pytest.raises(NnsslError, match="crop scale"):
        CropScale(**{"area": (0.2, 0.5), "length": (0.2, 0.5), **scale})
