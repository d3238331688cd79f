"""Physical truths of the whole solver, awkward input, matched smoothness, and the convexAdam package as a witness."""

import math
import warnings

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nnssl_ext.errors import NnsslError
from nnssl_ext.registration.smoothness import jacobian_determinant, smoothness
from nnssl_ext.registration.solver import SolverSettings, register_features
from nnssl_ext.registration.warp import compose, warp

SHAPE = (48, 64, 48)
MM = (1.0, 1.0, 1.0)


def texture(shape=SHAPE, channels=4, seed=0, detail=4.0):
    """Smooth features that look different everywhere; `detail` is the size of structures in voxels."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(1, channels, *(math.ceil(n / detail) + 3 for n in shape), generator=generator)
    return F.interpolate(small, size=shape, mode="trilinear", align_corners=False)[0] - 0.5


def inside(field, margin=10):
    return field[(slice(None), *(slice(margin, -margin),) * 3)]


def swell(shape, height):
    """A smooth field of up to `height` voxels along every axis, zero at the faces."""
    wave = torch.ones(shape)
    for axis, length in enumerate(shape):
        profile = torch.sin(math.pi * torch.arange(length) / (length - 1))
        wave = wave * profile.view([-1 if axis == other else 1 for other in range(3)])
    return torch.stack((wave, -wave, 0.5 * wave)) * height


@pytest.mark.parametrize("settings", [SolverSettings(), SolverSettings(diffeomorphic=True, iterations=20)])
def test_identity_gives_a_zero_field(settings):
    features = texture((24, 24, 24))
    field = register_features(features, features, MM, settings).displacement_voxels
    assert field.abs().max() < 1e-3


@pytest.mark.parametrize(("shape", "diffeomorphic"), [(SHAPE, False), ((24, 28, 26), True)])
@pytest.mark.parametrize("shift", [2, 4, 6])
def test_known_shifts_come_back_in_full(shift, shape, diffeomorphic):
    fixed = texture(shape)
    moving = torch.roll(fixed, (shift,) * 3, (1, 2, 3))
    settings = SolverSettings(coarse_mm=3.0, search_mm=9.0, diffeomorphic=diffeomorphic)
    found = inside(register_features(fixed, moving, MM, settings).displacement_voxels)
    torch.testing.assert_close(found.flatten(1).median(1).values, torch.full((3,), float(shift)), atol=0.05, rtol=0)


def test_the_packages_conventions_shorten_shifts():
    """By (n - 1) / n with n = 24 and 32 pooled cells on these axes."""
    fixed = texture()
    moving = torch.roll(fixed, (4, 4, 4), (1, 2, 3))
    settings = SolverSettings.convexadam(3, 3)
    found = inside(register_features(fixed, moving, MM, settings).displacement_voxels).flatten(1).median(1).values
    torch.testing.assert_close(found, torch.tensor([4 * 23 / 24, 4 * 31 / 32, 4 * 23 / 24]), atol=0.04, rtol=0)


@pytest.mark.parametrize("shape", [(40, 40, 40), (37, 41, 35)])
def test_a_smooth_warp_is_recovered_to_subvoxel(shape):
    truth = swell(shape, 3.0)
    moving = texture(shape)
    fixed = warp(moving, truth)
    found = register_features(fixed, moving, MM, SolverSettings(regularisation=0.3)).displacement_voxels
    error = inside(found - truth, 6).norm(dim=0)
    assert error.mean() < 0.2
    assert inside(truth, 6).norm(dim=0).mean() > 2


@pytest.mark.parametrize("consistent", [True, False])
def test_coarse_search_alone_and_without_consistency(consistent):
    fixed = texture()
    moving = torch.roll(fixed, (6, -6, 3), (1, 2, 3))
    settings = SolverSettings(coarse_mm=3.0, search_mm=9.0, iterations=0, inverse_consistent=consistent)
    found = inside(register_features(fixed, moving, MM, settings).displacement_voxels, 14)
    torch.testing.assert_close(found.flatten(1).mean(1), torch.tensor([6.0, -6.0, 3.0]), atol=0.3, rtol=0)


def test_anisotropic_voxels_give_the_field_of_their_isotropic_resampling():
    shape = (40, 40, 40)
    truth = swell(shape, 2.5)
    moving = texture(shape, detail=8.0)
    fixed = warp(moving, truth)
    settings = SolverSettings(coarse_mm=4.0, fine_mm=2.0, search_mm=8.0)
    isotropic = register_features(fixed, moving, MM, settings).displacement_mm
    slices = [F.avg_pool3d(features, (2, 1, 1)) for features in (fixed, moving)]
    anisotropic = register_features(*slices, (2.0, 1.0, 1.0), settings).displacement_mm
    difference = inside(F.avg_pool3d(isotropic, (2, 1, 1)) - anisotropic, 5)
    assert difference.abs().mean() < 0.1
    assert inside(anisotropic, 5).norm(dim=0).mean() > 1.5


def test_spacing_only_scales_when_settings_scale():
    fixed, moving = texture((20, 24, 20)), texture((20, 24, 20), seed=1)
    one = register_features(fixed, moving, MM)
    half = register_features(fixed, moving, (0.5, 0.5, 0.5))
    torch.testing.assert_close(half.displacement_voxels, one.displacement_voxels)
    torch.testing.assert_close(half.displacement_mm, one.displacement_mm / 2)


def test_scale_and_number_of_channels_do_not_matter():
    fixed, moving = texture((20, 24, 20)), texture((20, 24, 20), seed=1)
    settings = SolverSettings(iterations=10)
    once = register_features(fixed, moving, MM, settings).displacement_voxels
    again = register_features(*(8 * maps.repeat(2, 1, 1, 1) for maps in (fixed, moving)), MM, settings)
    assert (again.displacement_voxels - once).abs().mean() < 1e-3


@pytest.mark.parametrize("shape", [(1, 20, 20), (3, 4, 5), (2, 2, 2), (10, 10, 10), (7, 30, 11)])
@pytest.mark.parametrize("diffeomorphic", [True, False])
def test_any_size(shape, diffeomorphic):
    fixed, moving = texture(shape), texture(shape, seed=1)
    found = register_features(fixed, moving, MM, SolverSettings(iterations=5, diffeomorphic=diffeomorphic))
    assert found.displacement_voxels.shape == (3, *shape)
    assert torch.isfinite(found.displacement_voxels).all()


def test_constant_features_do_not_move():
    constant = torch.full((3, 16, 16, 16), 7.0)
    assert register_features(constant, constant, MM).displacement_voxels.abs().max() == 0
    assert torch.isfinite(register_features(constant, texture((16,) * 3, 3), MM).displacement_voxels).all()


@pytest.mark.parametrize("hidden", [slice(0, 7), slice(12, None)])
def test_masked_voxels_have_no_influence(hidden):
    shape = (19, 21, 18)
    fixed, moving = texture(shape), texture(shape, seed=1)
    masks = torch.ones(2, *shape, dtype=torch.bool)
    masks[0, hidden], masks[1, :, :, 15:] = False, False
    settings = SolverSettings(iterations=20)
    found = register_features(fixed, moving, MM, settings, *masks).displacement_voxels
    fixed, moving = fixed.clone(), moving.clone()
    fixed[:, ~masks[0]], moving[:, ~masks[1]] = 9.0, -9.0
    again = register_features(fixed, moving, MM, settings, *masks).displacement_voxels
    torch.testing.assert_close(again, found, atol=1e-4, rtol=0)


def test_diffeomorphic_fields_do_not_fold():
    fixed, moving = texture((24, 24, 24), detail=6.0), texture((24, 24, 24), seed=1, detail=6.0)
    free = register_features(fixed, moving, MM, SolverSettings(regularisation=0.02)).displacement_voxels
    assert smoothness(free).fold_percent > 0.1  # unrelated images, hardly regularised
    flow = register_features(fixed, moving, MM, SolverSettings(regularisation=0.02, diffeomorphic=True))
    assert (jacobian_determinant(flow.displacement_voxels, margin=1) > 0).all()
    assert flow.displacement_voxels.norm(dim=0).mean() > 0.5


def test_inverse_of_a_diffeomorphic_field():
    fixed, moving = texture((24, 24, 24), detail=6.0), texture((24, 24, 24), seed=1, detail=6.0)
    flow = register_features(fixed, moving, MM, SolverSettings(diffeomorphic=True, iterations=40))
    there_and_back = compose(flow.displacement_voxels, flow.inverse().displacement_voxels)
    assert inside(there_and_back, 6).norm(dim=0).mean() < 0.05
    assert inside(flow.displacement_voxels, 6).norm(dim=0).mean() > 1


@pytest.mark.parametrize("target", [0.08, 0.2])
def test_the_wanted_smoothness_is_reached(target):
    fixed, moving = texture((24, 24, 24), detail=6.0), texture((24, 24, 24), seed=1, detail=6.0)
    found = register_features(fixed, moving, MM, SolverSettings(sdlogj=target, iterations=30))
    assert smoothness(found.displacement_voxels).sdlogj == pytest.approx(target, rel=0.05)


def test_devices_spelt_differently_agree():
    fixed, moving = texture((12, 12, 12)), texture((12, 12, 12), seed=1)
    settings = SolverSettings(iterations=3)
    fields = [
        register_features(fixed.to(device), moving.to(device), MM, settings).displacement_voxels
        for device in ("cpu", torch.device("cpu"), torch.device("cpu", 0))
    ]
    assert torch.equal(fields[0], fields[1]) and torch.equal(fields[0], fields[2])


def test_bad_input_is_named():
    good = texture((8, 8, 8))
    with pytest.raises(NnsslError, match="shapes"):
        register_features(good, texture((8, 8, 9)), MM)
    broken = good.clone()
    broken[0, 0, 0, 0] = math.nan
    with pytest.raises(NnsslError, match="the moving features hold values"):
        register_features(good, broken, MM)
    with pytest.raises(NnsslError, match="fixed mask is empty"):
        register_features(good, good, MM, fixed_mask=torch.zeros(8, 8, 8, dtype=torch.bool))
    with pytest.raises(NnsslError, match="moving mask has shape"):
        register_features(good, good, MM, moving_mask=torch.ones(8, 8, 9, dtype=torch.bool))


@pytest.fixture(scope="module")
def package():
    """`convexAdam`, which silences all warnings on import; that is undone."""
    with warnings.catch_warnings():
        pytest.importorskip("convexAdam")
        from convexAdam import convex_adam_MIND, convex_adam_utils
    return convex_adam_MIND.convex_adam_pt, convex_adam_utils.MINDSSC


@pytest.mark.parametrize(("shape", "grid_sp", "disp_hw"), [((48, 64, 48), 3, 3), ((33, 43, 35), 4, 2)])
def test_the_package_given_the_same_mind(package, shape, grid_sp, disp_hw):
    """Adam divides by the gradient's own size, so where it is almost 0 a rounding error becomes a step. Hence few steps, and
    one voxel in a hundred may differ."""
    convex_adam_pt, mind = package
    fixed, moving = texture(shape, 1, detail=6.0), texture(shape, 1, seed=1, detail=6.0)
    common = {"grid_sp": grid_sp, "disp_hw": disp_hw}
    theirs = convex_adam_pt(
        fixed[0], moving[0], selected_niter=5, device=torch.device("cpu"), dtype=torch.float32, **common
    )
    features = [mind(image[None], 1, 2, device="cpu")[0] for image in (fixed, moving)]
    ours = register_features(*features, MM, SolverSettings.convexadam(**common, iterations=5)).displacement_voxels
    difference = np.abs(ours.movedim(0, -1).numpy() - theirs)
    assert np.abs(theirs).max() > 2
    assert np.quantile(difference, 0.98) < 1e-3
    assert difference.max() < 0.2


@pytest.mark.parametrize("first", range(5))
def test_a_structure_before_a_flat_background_is_found_and_not_pushed_out_of_view(first):
    """Leaving the image must not be the cheapest way to match a background: most of these pairs once ended there."""

    def image_and_label(number: int) -> tuple[torch.Tensor, torch.Tensor]:
        rng = np.random.default_rng(number)
        places = np.stack(np.mgrid[:16, :18, :20], axis=-1)
        ball = ((places - (8, 9, 10) - rng.uniform(-1.5, 1.5, 3)) ** 2).sum(-1) < 16
        image = gaussian_filter(ball * 1.0, 1) + 0.05 * gaussian_filter(rng.normal(size=ball.shape), 1)
        return torch.from_numpy((image - image.mean()) / image.std()).float(), torch.from_numpy(ball).float()

    (fixed, here), (moving, there) = image_and_label(first), image_and_label(first + 1)
    field = register_features(fixed[None], moving[None], (1.0, 1.0, 1.0)).displacement_voxels
    found = warp(there[None], field)[0] > 0.5
    assert 2 * (found * here).sum() / (found.sum() + here.sum()) > 0.9


class Largest(TorchDispatchMode):
    """Remembers how many numbers the largest new tensor has; views of the maps are none."""

    def __init__(self, *maps):
        super().__init__()
        self.maps, self.numbers = {each.untyped_storage().data_ptr() for each in maps}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for each in tree_leaves(made):
            if isinstance(each, torch.Tensor) and each.untyped_storage().data_ptr() not in self.maps:
                self.numbers = max(self.numbers, each.numel())
        return made


@pytest.mark.parametrize("masked", [False, True])
def test_maps_of_whole_scans_are_not_copied(masked):
    shape = (26, 25, 24)
    fixed, moving = texture(shape, 24), texture(shape, 24, seed=1)
    mask = torch.arange(26).view(-1, 1, 1).expand(shape) > 3 if masked else None
    with Largest(fixed, moving) as largest:
        register_features(fixed, moving, MM, SolverSettings(search_mm=4.0, iterations=1), mask, mask)
    assert largest.numbers < fixed.numel() / 2
