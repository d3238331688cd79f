"""Prototypes and places: what the figures say about outputs whose state is known."""

import math

import numpy as np
import pytest
import torch

from nnssl_ext.monitors.prototypes import PrototypeMonitor
from nnssl_ext.monitors.spatial import SpatialMonitor, token_similarity
from nnssl_ext.monitors.standard import standard_monitors
from nnssl_ext.records import Step


def say(monitor, name, *values):
    for value in values:
        monitor.see(Step(torch.zeros(()), watch={name: value}))
    return monitor.say()


@pytest.mark.parametrize(
    ("usage", "used", "entropy"),
    [
        ([0.25, 0.25, 0.25, 0.25], 1.0, 1.0),
        ([1.0, 0.0, 0.0, 0.0], 0.25, 0.0),
        ([0.5, 0.5, 0.0, 0.0], 0.5, 0.5),
        ([0.5, 0.3, 0.19, 0.01], 0.75, None),  # .01 is below a tenth of 1/4
    ],
)
def test_usage_of_prototypes(usage, used, entropy):
    said = say(PrototypeMonitor(), "prototypes", torch.tensor(usage))
    assert said["prototypes_used"] == used
    expected = -sum(p * math.log(p) for p in usage if p) / math.log(4) if entropy is None else entropy
    assert said["prototypes_entropy"] == pytest.approx(expected, abs=1e-6)


def test_steps_that_use_different_prototypes_add_up():
    monitor = PrototypeMonitor()
    assert say(monitor, "patch_prototypes", *torch.eye(4)) == {
        "patch_prototypes_used": 1.0,
        "patch_prototypes_entropy": pytest.approx(1),
    }
    assert monitor.say() == {}


def test_token_similarity_is_the_mean_of_the_gram_matrix_off_its_diagonal():
    x = torch.randn(3, 5, 7)
    unit = x / x.norm(dim=2, keepdim=True)
    pairs = [float(c[i] @ c[j]) for c in unit for i in range(5) for j in range(5) if i != j]
    assert float(token_similarity(x)) == pytest.approx(np.mean(pairs), abs=1e-6)
    assert float(token_similarity(torch.ones(2, 9, 4))) == pytest.approx(1)


@pytest.mark.parametrize(("places", "crops", "share"), [(0.0, 1.0, 0.0), (1.0, 0.0, 1.0), (1.0, 1.0, 0.5)])
def test_variance_across_places_and_crops(places, crops, share):
    torch.manual_seed(0)
    steps = [places * torch.randn(4, 256, 64) + crops * torch.randn(4, 1, 64) for _ in range(32)]
    said = say(SpatialMonitor(), "tokens", *steps)
    assert said["token_variance_share"] == pytest.approx(share, abs=0.02)
    if not places:
        assert said["token_similarity"] == pytest.approx(1, abs=1e-5)


def test_monitors_say_nothing_of_what_a_method_does_not_show():
    for monitor in standard_monitors():
        monitor.see(Step(torch.zeros(())))
        monitor.see(Step(torch.zeros(()), watch={"tokens": torch.randn(2, 1, 8)}))  # one place: nothing to compare
        assert monitor.say() == {}
