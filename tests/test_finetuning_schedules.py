"""Learning rates per iteration against hand values and against nnU-Net's own schedulers."""

from dataclasses import astuple

import pytest
import torch
from nnunetv2.training.lr_scheduler.warmup import Lin_incr_LRScheduler, PolyLRScheduler_offset

from nnssl_ext.trainers.finetuning.schedules import Rates, rates, warmup_poly
from nnssl_ext.trainers.finetuning.settings import FinetuneSettings


def settings(**changes: object) -> FinetuneSettings:
    base = {"epochs": 4, "iterations_per_epoch": 25, "lr_encoder": 2.0, "lr_decoder": 10.0, "lr_scratch": 100.0}
    return FinetuneSettings(**{**base, **changes})


def test_warmup_then_poly_by_hand() -> None:
    shares = [warmup_poly(step, total=10, warmup=2) for step in range(10)]
    assert shares[:3] == [0.5, 1.0, 1.0]
    assert shares[6] == pytest.approx(0.5**0.9)
    assert shares[9] == pytest.approx(0.125**0.9)
    assert [warmup_poly(0, total=1, warmup=0), warmup_poly(0, total=1, warmup=1)] == [1.0, 1.0]


def test_warmup_poly_equals_the_two_schedulers_of_nnunet() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    up = Lin_incr_LRScheduler(optimizer, 3e-4, 50)
    ours, theirs = [], []
    for epoch in range(1000):
        if epoch == 50:
            down = PolyLRScheduler_offset(optimizer, 3e-4, 1000, 50)
        (up if epoch < 50 else down).step(epoch)
        theirs.append(optimizer.param_groups[0]["lr"])
        ours.append(3e-4 * warmup_poly(epoch, 1000, 50))
    assert ours == pytest.approx(theirs, rel=1e-12)


def test_both_halves_have_their_own_peak() -> None:
    chosen = settings(warmup_share=0.1)
    assert astuple(rates(chosen, 4, pretrained=True)) == pytest.approx((1.0, 5.0))
    assert rates(chosen, 9, pretrained=True) == Rates(2.0, 10.0)
    assert rates(chosen, 55, pretrained=True).decoder == pytest.approx(10 * 0.5**0.9)


def test_frozen_never_moves_the_encoder() -> None:
    chosen = settings(schedule="frozen")
    assert all(rates(chosen, step, pretrained=True).encoder is None for step in range(100))
    assert rates(chosen, 9, pretrained=True).decoder == 10.0


def test_sawtooth_by_hand() -> None:
    """100 iterations: 20 decoder alone at 0.1 of its peak (10 up, 10 down), then 10 up and 70 down together."""
    chosen = settings(schedule="sawtooth", freeze_share=0.2, warmup_share=0.1, freeze_lr_scale=0.1)
    found = [rates(chosen, step, pretrained=True) for step in range(100)]
    assert all(r.encoder is None for r in found[:20]) and all(r.encoder is not None for r in found[20:])
    decoder = [r.decoder for r in found]
    assert decoder[0] == pytest.approx(0.1) and decoder[9] == decoder[10] == pytest.approx(1.0)
    assert decoder[15] == pytest.approx(0.5**0.9) and decoder[19] == pytest.approx(0.1**0.9)
    assert astuple(found[20]) == pytest.approx((0.2, 1.0))
    assert found[29] == found[30] == Rates(2.0, 10.0)
    assert astuple(found[65]) == pytest.approx((2 * 0.5**0.9, 10 * 0.5**0.9))


@pytest.mark.parametrize("schedule", ["warmup_poly", "frozen", "sawtooth"])
def test_without_pretrained_weights_the_whole_network_learns_at_its_own_rate(schedule: str) -> None:
    chosen = settings(schedule=schedule, warmup_share=0.1)
    for step in (0, 9, 10, 55, 99):
        expected = 100 * warmup_poly(step, 100, 10)
        assert rates(chosen, step, pretrained=False) == Rates(expected, expected)


@pytest.mark.parametrize("schedule", ["warmup_poly", "frozen", "sawtooth"])
@pytest.mark.parametrize("total", [1, 2, 3, 7, 60, 300])
def test_every_iteration_of_a_short_run_has_a_usable_rate(schedule: str, total: int) -> None:
    chosen = settings(schedule=schedule, epochs=1, iterations_per_epoch=total)
    assert all(0 < rates(chosen, step, pretrained=True).decoder <= 10 for step in range(total))
