import math

import pytest
import torch
from torch import nn

from nnssl_ext.engine.optim import build_optimizer, learning_rate, parameter_groups
from nnssl_ext.engine.settings import OptimSettings


def test_poly_schedule_by_hand():
    optim = OptimSettings(lr=1.0, schedule="poly", warmup=0.1)
    rates = [learning_rate(step, 100, optim) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == pytest.approx(1.0)
    assert rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.5**0.9)  # half of the 90 steps after the warm-up
    assert rates[99] == pytest.approx((1 / 90) ** 0.9)


def test_cosine_schedule_by_hand():
    optim = OptimSettings(lr=2.0, schedule="cosine", warmup=0.0, final_lr=0.5)
    assert learning_rate(0, 10, optim) == pytest.approx(2.0)
    assert learning_rate(5, 10, optim) == pytest.approx(1.25)
    assert learning_rate(10, 10, optim) == pytest.approx(0.5)
    assert learning_rate(2, 10, optim) == pytest.approx(0.5 + 1.5 * (1 + math.cos(0.2 * math.pi)) / 2)


def test_vectors_are_not_decayed_and_no_parameter_is_lost():
    module = nn.Sequential(nn.Conv3d(1, 2, 3), nn.LayerNorm(4), nn.Linear(4, 4))
    decayed, free = parameter_groups(module, 0.05)
    assert [p.ndim for p in decayed["params"]] == [5, 2]
    assert all(p.ndim == 1 for p in free["params"])
    assert len(free["params"]) == 4
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.05, 0.0)


def test_optimisers_take_the_settings():
    module = nn.Linear(2, 2)
    sgd = build_optimizer(module, OptimSettings(optimizer="sgd", lr=0.01, betas=(0.99, 0.0)))
    assert isinstance(sgd, torch.optim.SGD)
    assert (sgd.defaults["momentum"], sgd.defaults["nesterov"]) == (0.99, True)
    adamw = build_optimizer(module, OptimSettings(betas=(0.9, 0.98)))
    assert isinstance(adamw, torch.optim.AdamW)
    assert adamw.defaults["betas"] == (0.9, 0.98)
