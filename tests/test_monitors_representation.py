import numpy as np
import pytest
import torch
from torch.nn import functional

from nnssl_ext.monitors.representation import (
    CollapseMonitor,
    RepresentationMonitor,
    collapse_coefficient,
    effective_rank,
    relative_spread,
)
from nnssl_ext.records import Step


def test_isotropic_features_spread_like_one_and_identical_ones_like_zero():
    torch.manual_seed(0)
    assert relative_spread(torch.randn(2000, 64)) == pytest.approx(1, abs=0.03)
    assert relative_spread(torch.ones(50, 64)) == pytest.approx(0, abs=1e-6)


def test_effective_rank_counts_equally_strong_directions():
    torch.manual_seed(0)
    directions, _ = torch.linalg.qr(torch.randn(32, 4))
    assert effective_rank(torch.randn(5000, 4) @ directions.T) == pytest.approx(4, abs=0.05)
    assert effective_rank(torch.randn(5000, 1) @ torch.randn(1, 32) + 7) == pytest.approx(1, abs=0.01)


def test_effective_rank_equals_the_entropy_of_numpy_singular_values():
    x = np.random.default_rng(0).normal(size=(40, 10)) * np.arange(1, 11)
    s = np.linalg.svd(x - x.mean(0), compute_uv=False)
    p = s / s.sum()
    expected = np.exp(-(p * np.log(p)).sum())
    assert effective_rank(torch.tensor(x, dtype=torch.float32)) == pytest.approx(expected, rel=1e-4)


def test_monitor_pools_small_batches_and_forgets_after_speaking():
    torch.manual_seed(0)
    monitor = RepresentationMonitor()
    for number in range(400):
        assert number != 63 or monitor.say() == {}  # 126 vectors: too few to judge, but they are kept
        monitor.see(Step(torch.zeros(()), watch={"features": torch.randn(2, 16)}))
    assert 512 <= len(monitor.pool) <= 514
    said = monitor.say()
    assert said["feature_spread"] == pytest.approx(1, abs=0.1)
    assert said["effective_rank"] > 14
    assert monitor.say() == {}


@pytest.mark.parametrize("number", [2, 4, 8, 128])
def test_the_collapse_coefficient_of_healthy_vectors_is_zero_at_any_batch(number):
    """Without the correction it is .20, .08, .035 and .002 (methods.md 1, measured there)."""
    torch.manual_seed(0)
    batches = [torch.randn(number, 2048) for _ in range(64 // number + 4)]
    spread = np.mean([relative_spread(batch) for batch in batches])
    assert spread == pytest.approx(1, abs=0.005)
    thesis = 1 - np.mean([functional.normalize(b, dim=1).std(0).mean() * 2048**0.5 for b in batches])
    assert thesis == pytest.approx({2: 0.2, 4: 0.08, 8: 0.035, 128: 0.002}[number], abs=0.005)


def test_the_collapse_coefficient_by_hand_and_by_numpy():
    assert collapse_coefficient(torch.ones(200, 32)) == pytest.approx(1, abs=1e-6)
    # two directions, half each: per dimension values 1 and 0, standard deviation .5 * sqrt(n / (n - 1))
    halves = torch.eye(2).repeat_interleave(64, dim=0) * torch.rand(128, 1)
    assert collapse_coefficient(halves) == pytest.approx(1 - 2**0.5 * 0.5 * (128 / 127) ** 0.5 / 0.99803, abs=1e-4)
    x = np.random.default_rng(0).normal(size=(200, 8)) + 2
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    expected = 1 - 8**0.5 * unit.std(axis=0, ddof=1).mean()
    for dtype, tolerance in ((torch.float32, 2e-3), (torch.bfloat16, 1e-2)):  # c4 of 200 vectors is .9987
        assert collapse_coefficient(torch.tensor(x).to(dtype)) == pytest.approx(expected, abs=tolerance)


def test_the_collapse_coefficient_agrees_with_lightly():
    debug = pytest.importorskip("lightly.utils.debug", reason="lightly is only an oracle; pip install lightly")
    x = torch.randn(128, 2048) + 1
    expected = 1 - 2048**0.5 * float(debug.std_of_l2_normalized(x))
    assert collapse_coefficient(x) == pytest.approx(expected, abs=2e-3)  # lightly's has the bias of 128 vectors


def test_a_constant_predictor_shows_behind_a_healthy_projector():
    monitor = CollapseMonitor()
    for _ in range(70):
        monitor.see(Step(torch.zeros(()), watch={"projector": torch.randn(2, 64), "predictor": torch.ones(2, 64)}))
    said = monitor.say()
    assert said["projector_collapse"] < 0.05 and said["predictor_collapse"] > 0.99
