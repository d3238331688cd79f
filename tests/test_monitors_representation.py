import numpy as np
import pytest
import torch

from nnssl_ext.monitors.representation import RepresentationMonitor, effective_rank, relative_spread
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
    monitor = RepresentationMonitor(pool=128)
    assert monitor.say() == {}
    for _ in range(100):
        monitor.see(Step(torch.zeros(()), watch={"features": torch.randn(2, 16)}))
    assert 128 <= sum(map(len, monitor.seen)) <= 130
    said = monitor.say()
    assert said["feature_spread"] == pytest.approx(1, abs=0.1)
    assert said["effective_rank"] > 14
    assert monitor.say() == {}
