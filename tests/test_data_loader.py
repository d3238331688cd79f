"""The stream of batches is a function of seed and sample number, and of nothing else."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from preprocessed_cases import coordinate_volume, save_case

from nnssl_ext.data.cases import list_cases
from nnssl_ext.data.loader import RegionBatch, make_loader
from nnssl_ext.errors import NnsslError
from nnssl_ext.views.iou_pairs import IoUPairs
from nnssl_ext.views.masks import MaskSettings
from nnssl_ext.views.policies import IntensitySettings, SingleView, SpatialSettings

POLICY = SingleView(
    (8, 12, 8),
    MaskSettings((4, 4, 4)),
    SpatialSettings(rotation=0.5, zoom=0.5),
    IntensitySettings(noise=0.5, gamma=0.5),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("preprocessed")
    for number, shape in enumerate([(20, 24, 18), (16, 16, 30), (6, 30, 20), (24, 20, 20), (12, 12, 12)]):
        save_case(path, f"case_{number}", coordinate_volume(shape))
    return path


@pytest.fixture(scope="module")
def cases(folder):
    return list_cases(folder, (1.0, 1.0, 1.0))


def stream(cases, **change) -> list[RegionBatch]:
    settings = {"seed": 3, "start_step": 0, "steps": 6, "batch_size": 2} | change
    return list(make_loader(cases, POLICY, **settings))


def samples(batches: list[RegionBatch]) -> list[tuple]:
    """Every sample with its padding cut off, so that batches of different composition compare."""
    found = []
    for batch in batches:
        for row, (case, draws) in enumerate(zip(batch.cases, batch.draws, strict=True)):
            voxels = batch.voxels[row]
            for axis in range(1, 4):
                used = voxels.abs().amax([other for other in range(4) if other != axis]) > 0
                voxels = voxels.narrow(axis, 0, int(used.nonzero().max()) + 1)
            (draw,) = draws
            found.append((case, batch.lower[row], draw.affine, dict(draw.intensity), draw.mask, voxels))
    return found


def assert_same(first: list[tuple], second: list[tuple]) -> None:
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        assert a[0] == b[0] and a[3] == b[3]
        for i in (1, 2, 4, 5):
            np.testing.assert_array_equal(a[i], b[i])


def test_region_holds_what_its_case_holds_there(cases):
    shapes = {case.identifier: case.shape for case in cases}
    for case, lower, _, _, _, voxels in samples(stream(cases)):
        volume = coordinate_volume(shapes[case])
        upper = lower + torch.tensor(voxels.shape[1:])
        np.testing.assert_array_equal(voxels, volume[(slice(None), *map(slice, lower.tolist(), upper.tolist()))])


def test_same_seed_same_stream_and_another_seed_another(cases):
    assert_same(samples(stream(cases)), samples(stream(cases)))
    others = samples(stream(cases, seed=4))
    assert any(not np.array_equal(a[2], b[2]) for a, b in zip(samples(stream(cases)), others, strict=True))


def test_a_stream_from_a_later_step_is_the_tail(cases):
    assert_same(samples(stream(cases)[4:]), samples(stream(cases, start_step=4, steps=2)))


def test_two_processes_see_what_one_with_twice_the_batch_sees(cases):
    whole = samples(stream(cases, batch_size=4))
    halves = [stream(cases, rank=rank, world_size=2) for rank in range(2)]
    both = [sample for pair in zip(*halves, strict=True) for batch in pair for sample in samples([batch])]
    assert_same(whole, both)


def test_workers_change_nothing(cases):
    assert_same(samples(stream(cases)), samples(stream(cases, workers=2)))


def test_the_global_random_state_is_left_alone(cases):
    before = torch.get_rng_state()
    stream(cases, steps=1)
    assert torch.equal(before, torch.get_rng_state())


def test_every_case_once_per_epoch_in_changing_order(cases):
    order = [batch.cases[0] for batch in stream(cases, steps=50, batch_size=1)]
    epochs = [tuple(order[i : i + 5]) for i in range(0, 50, 5)]
    assert all(Counter(epoch) == Counter(case.identifier for case in cases) for epoch in epochs)
    assert len(set(epochs)) > 5


def test_batch_states_shapes_spacings_and_length(cases):
    loader = make_loader(cases, POLICY, seed=0, start_step=2, steps=3, batch_size=2)
    assert len(loader) == 3
    batch = next(iter(loader))
    shapes = {case.identifier: case.shape for case in cases}
    assert [tuple(shape) for shape in batch.case_shape.tolist()] == [shapes[name] for name in batch.cases]
    assert batch.spacing.tolist() == [[1, 1, 1]] * 2


def test_the_quantiles_of_a_step_lie_one_in_each_interval_in_changing_order(cases):
    seen: list[float] = []

    class Listener:
        def draw(self, case, rng, quantile):
            seen.append(quantile)
            return POLICY.draw(case, rng, quantile)

    strata = []
    for rank in range(2):
        loader = make_loader(cases, Listener(), seed=1, start_step=0, steps=40, batch_size=2, rank=rank, world_size=2)
        seen.clear()  # of the trial of every case
        list(loader)
        strata.append(np.reshape([int(4 * quantile) for quantile in seen], (40, 2)))
    steps = np.concatenate(strata, axis=1)
    assert np.array_equal(np.sort(steps, axis=1), np.tile(np.arange(4), (40, 1)))
    assert len({tuple(step) for step in steps.tolist()}) > 10


def test_no_cases():
    with pytest.raises(NnsslError, match="no case to train on"):
        make_loader([], POLICY, seed=0, start_step=0, steps=1, batch_size=1)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_case_is_named_also_from_a_worker(tmp_path, workers):
    save_case(tmp_path, "good", coordinate_volume((12, 12, 12)))
    save_case(tmp_path, "bad", coordinate_volume((12, 12, 12)))
    cases = list_cases(tmp_path, (1.0, 1.0, 1.0))
    (tmp_path / "bad.b2nd").write_bytes(b"no longer a volume")
    with pytest.raises(NnsslError, match=r"^case bad: cannot read .*bad\.b2nd"):
        stream(cases, steps=2, workers=workers)


def test_a_policy_that_does_not_fit_is_reported_as_such(cases):
    policy = SingleView((8, 12, 8), MaskSettings((5, 4, 4)))
    with pytest.raises(NnsslError, match="do not divide"):
        make_loader(cases, policy, seed=0, start_step=0, steps=1, batch_size=1, workers=1)


def test_a_case_that_the_policy_refuses_is_named_before_anything_is_read(tmp_path):
    for name, shape in {"large": (20, 20, 20), "small": (12, 13, 14)}.items():
        save_case(tmp_path, name, coordinate_volume(shape))
    cases = list_cases(tmp_path, (1.0, 1.0, 1.0))
    pairs = {"seed": 0, "start_step": 0, "steps": 1, "batch_size": 1}
    make_loader(cases, IoUPairs((10, 10, 10), (0.4, 0.6)), **pairs)
    with pytest.raises(NnsslError, match=r"case small of \(12, 13, 14\) voxels .* it reaches 0\.202 to 1"):
        make_loader(cases, IoUPairs((10, 10, 10), (0.0, 0.1)), **pairs)
