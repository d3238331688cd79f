"""Pairs of crops around an anchor in the body, cut from preprocessed cases."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from preprocessed_cases import coordinate_volume, save_case
from scipy import stats

from nnssl_ext.contracts import HounsfieldScale
from nnssl_ext.data.cases import list_cases
from nnssl_ext.data.intensity_scale import ScaleSettings
from nnssl_ext.data.loader import make_loader
from nnssl_ext.geometry.matching import covisible
from nnssl_ext.geometry.voxel_pairs import sample_pairs
from nnssl_ext.records import Case, View
from nnssl_ext.views.anchored_pairs import AnchoredPairs, _enclosed, body_mask, draw_anchor, joined
from nnssl_ext.views.cut import cut_views
from nnssl_ext.views.dense_recipes import LocalIntensity
from nnssl_ext.views.policies import SpatialSettings
from nnssl_ext.views.recipes import STILL

SIZE = (12, 10, 14)
SHAPE = (30, 26, 40)
PLAIN = LocalIntensity(shuffle=0.0, bezier=0.0, inpaint=0.0)
TURNED = SpatialSettings(flip=(0.5,) * 3, rot90=(0.5,) * 3, rotation=1.0, degrees=30.0, zoom=1.0, zoom_range=(0.7, 1.4))
FLIPPED = SpatialSettings(flip=(0.5,) * 3, rot90=(0.5,) * 3, rotation=0.0, zoom=0.0)
SPATIAL = {"still": STILL, "flipped": FLIPPED, "turned": TURNED}
EVERYWHERE = HounsfieldScale(mean=0.0, std=1.0, lower=-1e9, upper=1e9)


def policy(**changes) -> AnchoredPairs:
    """All of a case is body unless said otherwise."""
    settings = {"recipe": PLAIN, "scale": ScaleSettings(body_hu=-1e8), "hounsfield": EVERYWHERE, "pairs": 2, **changes}
    return AnchoredPairs(settings.pop("size", SIZE), **settings)


@pytest.fixture
def folder(tmp_path):
    """A case of three channels that hold z, y and x."""
    save_case(tmp_path, "case", coordinate_volume(SHAPE))
    return tmp_path


def the_case(folder, spacing=(1.0, 1.0, 1.0)) -> Case:
    return list_cases(folder, spacing)[0]


def cut(case: Case, chosen: AnchoredPairs, seed: int = 0, batch: int = 1) -> tuple[View, ...]:
    batches = make_loader([case], chosen, seed=seed, start_step=0, steps=1, batch_size=batch)
    return cut_views(next(iter(batches)), torch.device("cpu"))


def anchor_of(view: View) -> np.ndarray:
    return np.array([view.applied[0][f"anchor_{axis}"] for axis in "zyx"])


@pytest.mark.parametrize("spatial", SPATIAL)
@pytest.mark.parametrize("size", [SIZE, (40, 10, 14)])  # the second is longer than the case
def test_both_crops_of_a_thousand_pairs_hold_the_anchor_and_the_same_voxel(folder, spatial, size):
    case = the_case(folder, (2.0, 1.0, 1.0))
    chosen = policy(spatial=SPATIAL[spatial], size=size, pairs=500)
    draws = [draw for seed in (0, 1) for draw in chosen.draw(case, np.random.default_rng(seed), 0.5)]
    assert len(draws) == 2000
    for first, second in zip(draws[0::2], draws[1::2], strict=True):
        assert first.facts == second.facts
        anchor = np.array([first.facts[f"anchor_{axis}"] for axis in "zyx"])
        assert (anchor >= 0).all() and (anchor < SHAPE).all()
        for draw in (first, second):
            here = np.linalg.solve(draw.affine, np.append(anchor, 1))[:3]
            np.testing.assert_allclose(here, np.rint(here), atol=1e-6)  # it is a voxel of the view
            assert (here > -1e-6).all() and (here < np.array(size) - 1 + 1e-6).all()


@pytest.mark.parametrize("spatial", SPATIAL)
def test_sampled_pairs_are_the_same_physical_voxel(folder, spatial):
    """Channels hold each voxel's own index: both views must read the same there."""
    case = the_case(folder, (2.0, 1.0, 1.0))
    for seed in range(6):
        first, second = cut(case, policy(spatial=SPATIAL[spatial], pairs=1), seed)
        assert covisible(first, second).any()
        pairs = sample_pairs(first, second, body_mask(first), 50, (1, 1, 1), [seed])
        (here, there), valid = (pairs.first, pairs.second), pairs.valid[0]
        z, y, x = here[0, valid].T
        read = first.voxels[0, :, z, y, x].T
        grid = (2 * there[0, valid] + 1) / torch.tensor(SIZE) - 1
        found = torch.nn.functional.grid_sample(
            second.voxels, grid.flip(-1)[None, None, None], padding_mode="border", align_corners=False
        )[0, :, 0, 0].T
        in_case = torch.stack([here[0, valid].double(), there[0, valid].double()])
        affines = torch.stack([view.affine[0].double() for view in (first, second)])
        places = torch.einsum("vij,vnj->vni", affines[:, :3, :3], in_case) + affines[:, None, :3, 3]
        assert (places[0] - places[1]).abs().max() < 1e-3
        inner = ((places[0] > 1) & (places[0] < torch.tensor(SHAPE) - 2)).all(1)  # not at the case's faded border
        inner &= ((there[0, valid] > 1) & (there[0, valid] < torch.tensor(SIZE) - 2)).all(1)
        assert inner.any()
        torch.testing.assert_close(read[inner], found[inner], atol=2e-3, rtol=0)
        torch.testing.assert_close(read[inner], places[0][inner].float(), atol=2e-3, rtol=0)


def test_crops_are_uniform_over_the_boxes_around_the_anchor(folder):
    case = the_case(folder)
    offsets = []
    for seed in range(40):
        for draw in policy(pairs=25).draw(case, np.random.default_rng(seed), 0.5):
            anchor = np.array([draw.facts[f"anchor_{axis}"] for axis in "zyx"])
            assert np.array_equal(draw.affine[:3, :3], np.eye(3))
            corner = draw.affine[:3, 3]
            assert (corner >= 0).all() and (corner + SIZE <= SHAPE).all()
            free = (anchor >= np.array(SIZE) - 1) & (anchor <= np.array(SHAPE) - SIZE)
            offsets.append(np.where(free, anchor - corner, np.nan))
    for axis, length in enumerate(SIZE):
        seen = np.array(offsets)[:, axis]
        counts = np.bincount(seen[~np.isnan(seen)].astype(int), minlength=length)
        assert len(counts) == length and stats.chisquare(counts).pvalue > 1e-3


def body_case(folder, shell: bool = False) -> tuple[Case, np.ndarray]:
    """A ball of intensity 1 in air of -3; or a hollow one."""
    grid = np.stack(np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in SHAPE), indexing="ij"))
    radius = np.sqrt((grid**2).sum(0))
    ball = (radius < 12) & ((radius > 7) if shell else True)
    noise = np.random.default_rng(0).normal(0, 0.1, SHAPE)
    save_case(folder, "case", (np.where(ball, 1.0, -3.0) + noise)[None].astype(np.float32))
    return the_case(folder), radius < 12


def test_anchors_are_uniform_over_the_body(tmp_path):
    case, inside = body_case(tmp_path)
    rng = np.random.default_rng(0)
    drawn = [draw_anchor(case, -1.0, rng) for _ in range(600)]
    places = np.array([place for place, found in drawn if found])
    assert len(places) >= 595 and inside[tuple(places.T)].all()  # 32 tries miss a body of 23 % once in 4,000 times
    for axis in range(3):
        share = inside.sum(tuple(other for other in range(3) if other != axis)) / inside.sum()
        counts = np.bincount(places[:, axis], minlength=SHAPE[axis])
        thirds = np.array_split(np.flatnonzero(share), 3)
        observed = [counts[part].sum() for part in thirds]
        assert stats.chisquare(observed, [len(places) * share[part].sum() for part in thirds]).pvalue > 1e-3


def test_an_anchor_outside_the_body_is_taken_only_at_last_and_recorded(tmp_path):
    case, _ = body_case(tmp_path)
    assert not draw_anchor(case, 99.0, np.random.default_rng(0))[1]
    chosen = policy(hounsfield=None, scale=ScaleSettings(body_share=5.0))
    assert {draw.facts["anchor_found"] for draw in chosen.draw(case, np.random.default_rng(0), 0.5)} == {0.0}


@pytest.mark.parametrize("shell", [False, True])
def test_the_body_mask_is_the_bodys_and_augmentation_does_not_change_it(tmp_path, shell):
    case, inside = body_case(tmp_path, shell)
    whole = policy(size=SHAPE, hounsfield=None, scale=ScaleSettings(), pairs=1)
    (view, _) = cut(case, replace(whole, recipe=LocalIntensity()), batch=1)
    found = body_mask(view)[0].numpy()
    assert not torch.equal(view.voxels, view.clean)
    wrong = (found != inside).sum()
    assert wrong < 0.02 * inside.sum()  # a hollow is filled, but for corners seen along one axis only


def test_between_two_plates_is_no_hollow():
    """A table below and an arm above: what lies between them does so along one axis only."""
    plates = torch.zeros(1, 9, 9, 9, dtype=torch.bool)
    plates[:, 1], plates[:, 7] = True, True
    assert not _enclosed(plates)[:, 2:7].any()


def test_padding_is_no_body(folder):
    view, _ = cut(the_case(folder), policy(size=(40, 10, 14), pairs=1))
    mask = body_mask(view)
    assert mask[0, 5:35].all() and not mask[0, :5].any() and not mask[0, 35:].any()


def test_views_keep_clean_voxels_and_their_facts(tmp_path):
    case, _ = body_case(tmp_path)
    recipe = LocalIntensity(shuffle=1.0, bezier=1.0, inpaint=1.0)
    views = cut(case, policy(recipe=recipe, pairs=2, hounsfield=None, scale=ScaleSettings()), batch=2)
    plain = cut(case, policy(pairs=2, hounsfield=None, scale=ScaleSettings()), batch=2)
    assert len(views) == 4
    for view in views:
        assert not torch.equal(view.clean, view.voxels)
        for facts in view.applied:
            assert {"shuffle", "bezier", "inpaint", "shuffle_seed", "bezier_seed", "inpaint_seed"} < facts.keys()
    assert torch.equal(views[0].clean, plain[0].clean)  # the first draw of both is the same place


def test_joined_views_are_one_batch(tmp_path):
    case, _ = body_case(tmp_path)
    views = cut(case, policy(pairs=2, hounsfield=None, scale=ScaleSettings()), batch=2)
    both = joined(views[0::2])
    assert both.voxels.shape[0] == len(both.cases) == len(both.applied) == 4
    assert torch.equal(both.voxels[2:], views[2].voxels) and torch.equal(both.affine[:2], views[0].affine)
    assert torch.equal(both.clean[2:], views[2].clean) and both.applied[3] == views[2].applied[1]
