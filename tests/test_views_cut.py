"""Views hold what their affines say, to a thousandth of a voxel; plain crops hold exactly it."""

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from preprocessed_cases import coordinate_volume, save_case
from scipy import ndimage

from nnssl_ext.contracts import ViewDraw
from nnssl_ext.data.cases import list_cases
from nnssl_ext.data.loader import make_loader
from nnssl_ext.geometry.affines import is_integer, quarter_turns, view_to_case
from nnssl_ext.geometry.matching import case_coordinates, matched_coordinates
from nnssl_ext.views.augment import augment
from nnssl_ext.views.cut import cut_views, resample
from nnssl_ext.views.masks import MaskSettings
from nnssl_ext.views.policies import IntensitySettings, SingleView, SpatialSettings, draw_affine

CPU = torch.device("cpu")
SIZE = (16, 24, 20)
TURNED = SpatialSettings(rotation=1.0, zoom=1.0)
PLAIN = SpatialSettings(rotation=0.0, zoom=0.0)
MIXED = SpatialSettings(rotation=0.5, zoom=0.3)
SPACINGS = {"iso": (1.0, 1.0, 1.0), "thick": (5.0, 1.0, 1.2)}


@dataclass(frozen=True)
class TwoViews:
    """Two views of one case, one of them larger."""

    first: SingleView
    second: SingleView

    def draw(self, case, rng, quantile) -> tuple[ViewDraw, ...]:
        return (*self.first.draw(case, rng, quantile), *self.second.draw(case, rng, quantile))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("preprocessed")
    for number, shape in enumerate([(40, 44, 42), (30, 52, 36), (12, 20, 30), (33, 18, 64)]):
        save_case(path, f"case_{number}", coordinate_volume(shape))
    return path


def batches(folder, policy, spacing="iso", steps=4, batch_size=3):
    cases = list_cases(folder, SPACINGS[spacing])
    return make_loader(cases, policy, seed=5, start_step=0, steps=steps, batch_size=batch_size)


def strictly_inside(view):
    """Without `inside_case`'s tolerance, at the edge of which voxels are mixed with a thousandth of padding."""
    places = case_coordinates(view)
    return ((places >= 0) & (places <= view.case_shape[:, None, None, None] - 1)).all(-1)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("spatial", [PLAIN, MIXED, TURNED])
def test_coordinate_volume_shows_each_voxel_its_own_place(folder, spatial, spacing):
    for batch in batches(folder, SingleView(SIZE, spatial=spatial), spacing):
        (view,) = cut_views(batch, CPU)
        places, inside = case_coordinates(view), strictly_inside(view)
        found, expected = view.voxels.movedim(1, -1)[inside], places[inside]
        assert inside.float().mean() > 0.2
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


def test_matched_voxels_of_two_views_show_the_same_coordinates(folder):
    policy = TwoViews(SingleView(SIZE, spatial=TURNED), SingleView((28, 32, 30), spatial=TURNED))
    compared = 0
    for batch in batches(folder, policy):
        first, second = cut_views(batch, CPU)
        assert second.voxels.shape[2:] == (28, 32, 30)
        places = matched_coordinates(first, second)
        for b in range(len(batch.cases)):
            values = [
                ndimage.map_coordinates(second.voxels[b, c].numpy(), places[b].movedim(-1, 0).numpy(), order=1, cval=-9)
                for c in range(3)
            ]
            # Compare where all eight neighbours in the second view show the case.
            safe = ndimage.map_coordinates(
                strictly_inside(second)[b].float().numpy(), places[b].movedim(-1, 0).numpy(), order=1, cval=0
            )
            safe = (safe > 0.9999) & strictly_inside(first)[b].numpy()
            compared += safe.sum()
            np.testing.assert_allclose(np.stack(values)[:, safe], first.voxels[b].numpy()[:, safe], atol=2e-3)
    assert compared > 10_000


def test_plain_crops_equal_slices_padded_with_zeros(folder):
    for batch in batches(folder, SingleView(SIZE, spatial=PLAIN)):
        (view,) = cut_views(batch, CPU)
        for b, shape in enumerate(batch.case_shape.tolist()):
            padded = np.pad(coordinate_volume(shape), ((0, 0), (30, 30), (30, 30), (30, 30)))
            axes = np.diag(view.affine[b].numpy())[:3]
            first = view.affine[b, :3, 3].numpy()
            lower = np.where(axes > 0, first, first - np.array(SIZE) + 1).astype(int) + 30
            expected = padded[(slice(None), *map(slice, lower, lower + SIZE))]
            expected = np.flip(expected, [axis + 1 for axis in range(3) if axes[axis] < 0])
            np.testing.assert_array_equal(view.voxels[b], expected)


def test_resampling_equals_scipy_also_at_the_border_of_the_case(tmp_path):
    image = np.random.default_rng(0).standard_normal((2, 20, 22, 18)).astype(np.float32)
    save_case(tmp_path, "case", image)
    (case,) = list_cases(tmp_path, (1.0, 1.0, 1.0))
    policy = SingleView(SIZE, spatial=SpatialSettings(rotation=1.0, zoom=1.0, zoom_range=(1.1, 1.4)))
    for batch in make_loader([case], policy, seed=0, start_step=0, steps=3, batch_size=1):
        (view,) = cut_views(batch, CPU)
        affine = batch.draws[0][0].affine
        for c in range(2):
            expected = ndimage.affine_transform(
                np.pad(image[c], 20), affine[:3, :3], affine[:3, 3] + 20, SIZE, order=1, mode="constant"
            )
            np.testing.assert_allclose(view.voxels[0, c], expected, atol=1e-4)
        assert (view.voxels == 0).any()


def test_a_sample_does_not_depend_on_its_batch(folder):
    policy = SingleView(SIZE, MaskSettings((4, 4, 4)), MIXED, IntensitySettings(noise=0.5, gamma=0.5))
    together = [cut_views(batch, CPU)[0] for batch in batches(folder, policy, steps=2, batch_size=6)]
    alone = [cut_views(batch, CPU)[0] for batch in batches(folder, policy, steps=12, batch_size=1)]
    assert len({len(view.applied[0]) for view in alone}) > 2
    for number, view in enumerate(alone):
        whole, row = together[number // 6], number % 6
        assert (view.cases[0], view.applied[0]) == (whole.cases[row], whole.applied[row])
        assert torch.equal(view.mask[0], whole.mask[row])
        assert torch.equal(view.affine[0], whole.affine[row])
        torch.testing.assert_close(view.voxels[0], whole.voxels[row], atol=1e-4, rtol=1e-4)


def test_views_carry_masks_shapes_and_what_was_applied(folder):
    policy = SingleView(SIZE, MaskSettings((4, 4, 4)), PLAIN, IntensitySettings(brightness=1.0))
    batch = next(iter(batches(folder, policy)))
    (view,) = cut_views(batch, CPU)
    assert view.mask is not None and view.mask.dtype == torch.bool and view.mask.shape == (3, 4, 6, 5)
    assert view.cases == batch.cases and torch.equal(view.case_shape, batch.case_shape)
    for b, draws in enumerate(batch.draws):
        assert view.applied[b] == dict(draws[0].intensity) and "brightness" in view.applied[b]
        np.testing.assert_array_equal(view.mask[b], draws[0].mask)
    (bare,) = cut_views(next(iter(batches(folder, SingleView(SIZE)))), CPU)
    assert bare.mask is None


def test_slabs_leave_no_seam(folder, monkeypatch):
    batch = next(iter(batches(folder, SingleView(SIZE, spatial=TURNED))))
    (whole,) = cut_views(batch, CPU)
    monkeypatch.setattr("nnssl_ext.views.cut.SLAB", 3 * 3 * SIZE[1] * SIZE[2])  # 3 planes of 3 samples; 16 = 5 * 3 + 1
    (slabs,) = cut_views(batch, CPU)
    torch.testing.assert_close(slabs.voxels, whole.voxels, atol=1e-3, rtol=0)  # a seam would be off by a voxel


def test_zero_strength_is_the_identity(folder):
    (case, *_) = list_cases(folder, SPACINGS["iso"])
    still = SpatialSettings(flip=(0.0,) * 3, rotation=1.0, degrees=0.0, zoom=1.0, zoom_range=(1.0, 1.0))
    affine = draw_affine(case, case.shape, still, np.random.default_rng(0))
    np.testing.assert_array_equal(affine, np.eye(4))
    np.testing.assert_array_equal(affine, view_to_case(case.shape, (np.array(case.shape) - 1) / 2))
    image = torch.randn(1, 1, 8, 8, 8)
    same = {"noise": 0.0, "noise_seed": 1.0, "blur": 0.1, "brightness": 1.0, "contrast": 1.0, "low_resolution": 1.0}
    torch.testing.assert_close(
        augment(image.clone(), [{**same, "gamma_inverted": 1.0, "gamma": 1.0}]), image, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("lower", [-40, -3, 0, 7, 9, 60])
def test_a_crop_anywhere_even_outside_is_padded_with_zeros(lower, flip):
    region, size = torch.rand(1, 2, 10, 10, 10) + 1, (4, 6, 5)
    centre = np.array([lower + 1.5, 2 + 2.5, 3 + 2.0])
    affine = view_to_case(size, centre, flips=(flip, False, flip))
    view = resample(region, affine[None, None], np.zeros((1, 3), int), size)[0, 0]
    padded = np.pad(region[0].numpy(), ((0, 0), (60, 60), (0, 0), (0, 0)))
    expected = padded[:, lower + 60 : lower + 64, 2:8, 3:8]
    np.testing.assert_array_equal(view, expected[:, ::-1, :, ::-1] if flip else expected)


@pytest.mark.parametrize("counts", [*itertools.product((0, 1, 3), (0, 2), (0, 1, 2))])
def test_quarter_turns_are_copied_exactly_as_numpy_turns(counts):
    region = np.random.default_rng(0).random((2, 12, 12, 12), np.float32)
    affine = view_to_case((6, 6, 6), (5.5, 4.5, 6.5), flips=(True, False, False), quarters=quarter_turns(counts))
    assert is_integer(affine)
    view = resample(torch.from_numpy(region)[None], affine[None, None], np.zeros((1, 3), int), (6, 6, 6))[0, 0]
    expected = region[:, 3:9, 2:8, 4:10]
    for count, plane in zip(counts, ((2, 3), (1, 3), (1, 2)), strict=True):  # about z, y, x
        expected = np.rot90(expected, -count, plane)
    np.testing.assert_array_equal(view, np.flip(expected, 1))
