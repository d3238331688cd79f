"""The pull of a loss's terms on shared parameters, and that looking at it changes nothing."""

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from lightning_fabric import Fabric
from tiny_dataset import job_of, log_of, weights_of, write_dataset
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nnssl_ext.engine import loop
from nnssl_ext.engine.gradients import compare_gradients
from nnssl_ext.trainers.pretraining.mae import MAETrainer

FABRIC = Fabric(accelerator="cpu", devices=1)


def test_shares_and_cosines_by_hand():
    shared, head, frozen = (nn.Parameter(torch.tensor([1.0, 2.0])) for _ in range(3))
    frozen.requires_grad_(False)
    parts = {
        "a": shared @ torch.tensor([3.0, 4.0]) + 100 * head.sum(),  # 5 long; the head is its own
        "b": 2 * shared[0] + (frozen * shared).sum() - shared.sum(),  # (2, 1): sqrt 5 long
        "c": -shared @ torch.tensor([3.0, 4.0]),
    }
    found = compare_gradients(FABRIC, parts, [shared, head, frozen])
    total = 5 + 5**0.5 + 5
    assert found == pytest.approx(
        {
            "grad_share_a": 5 / total,
            "grad_share_b": 5**0.5 / total,
            "grad_share_c": 5 / total,
            "grad_cosine_a_b": (3 * 2 + 4 * 1) / (5 * 5**0.5),
            "grad_cosine_a_c": -1.0,
            "grad_cosine_b_c": -(3 * 2 + 4 * 1) / (5 * 5**0.5),
        }
    )
    assert shared.grad is None and head.grad is None
    sum(parts.values()).backward()  # the graph is still there
    torch.testing.assert_close(shared.grad, torch.tensor([2.0, 1.0]))


class Largest(TorchDispatchMode):
    """The largest number of values in a tensor that any operation makes."""

    values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.values = max([self.values, *(t.numel() for t in tree_leaves(made) if isinstance(t, torch.Tensor))])
        return made


def test_gradients_are_compared_without_copies_of_all_of_them():
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(20)))
    for layer in layers:
        nn.init.orthogonal_(layer.weight)  # so that gradients neither vanish nor explode
    scale = nn.Parameter(torch.tensor(2.0))  # without an axis
    out = layers(torch.randn(4, 8)) * scale
    parts = {"a": out.square().mean(), "b": out.sum(), "c": out.abs().mean()}
    parameters = [*layers.parameters(), scale]
    whole = [
        torch.cat([g.flatten() for g in torch.autograd.grad(p, parameters, retain_graph=True)]) for p in parts.values()
    ]
    with Largest() as largest:
        found = compare_gradients(FABRIC, parts, parameters)
    assert largest.values <= 3 * 64  # one layer's gradients of the three terms; all layers have 1,280 values
    lengths = torch.stack([g.norm() for g in whole])
    assert [found[f"grad_share_{name}"] for name in parts] == pytest.approx((lengths / lengths.sum()).tolist())
    for (first, a), (second, b) in combinations(zip(parts, whole, strict=True), 2):
        assert found[f"grad_cosine_{first}_{second}"] == pytest.approx(float(torch.cosine_similarity(a, b, dim=0)))


def test_one_term_or_nothing_shared_gives_no_figures():
    a, b = (nn.Parameter(torch.ones(2)) for _ in range(2))
    assert compare_gradients(FABRIC, {"a": a.sum(), "off": torch.zeros(())}, [a, b]) == {}
    assert compare_gradients(FABRIC, {"a": a.sum(), "b": b.sum()}, [a, b]) == {}
    assert compare_gradients(FABRIC, {}, [a, b]) == {}


def test_looking_changes_no_weight_and_is_logged_once_per_epoch(nnunet_env, monkeypatch, tmp_path):
    write_dataset(nnunet_env.preprocessed)
    flags = ("--epochs", "2", "--iterations", "2", "--optim.accumulate", "2")
    plain = job_of(*flags)
    assert loop.pretrain(plain)
    forward = MAETrainer.forward

    def in_two_parts(self, views):
        step = forward(self, views)
        return replace(step, parts={"most": 0.75 * step.loss, "rest": 0.25 * step.loss})

    monkeypatch.setenv("nnssl_results", str(tmp_path / "looked"))
    monkeypatch.setattr(MAETrainer, "forward", in_two_parts)
    looked = job_of(*flags)
    assert loop.pretrain(looked)
    for name, value in weights_of(plain).items():
        assert torch.equal(value, weights_of(looked)[name]), name
    for row in log_of(looked):
        assert float(row["grad_share_most"]) == pytest.approx(0.75)
        assert float(row["grad_cosine_most_rest"]) == pytest.approx(1.0)
    assert "grad_share_most" not in log_of(plain)[0]
