import math

import pytest
import torch
from torch import nn

from nnssl_ext.contracts import OptimRule
from nnssl_ext.engine.optim import Schedule, build_optimizer, clip_gradients, parameter_groups
from nnssl_ext.engine.settings import OptimSettings
from nnssl_ext.errors import NnsslError


def schedule(total: int, batch: int = 1, **settings) -> Schedule:
    return Schedule(OptimSettings(**settings), total, batch)


def test_poly_schedule_by_hand():
    rates = [schedule(100, lr=1.0, schedule="poly", warmup=0.1).learning_rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == pytest.approx(1.0)
    assert rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.5**0.9)  # half of the 90 steps after the warm-up
    assert rates[99] == pytest.approx((1 / 90) ** 0.9)


def test_cosine_schedule_by_hand():
    rate = schedule(10, lr=2.0, schedule="cosine", warmup=0.0, final_lr=0.5).learning_rate
    assert rate(0) == pytest.approx(2.0)
    assert rate(5) == pytest.approx(1.25)
    assert rate(10) == pytest.approx(0.5)
    assert rate(2) == pytest.approx(0.5 + 1.5 * (1 + math.cos(0.2 * math.pi)) / 2)


def test_a_constant_rate_stays_what_was_asked_for():
    rate = schedule(10, lr=1e-4, schedule="constant", warmup=2.0).learning_rate
    assert [rate(step) for step in (0, 1, 2, 9)] == pytest.approx([5e-5, 1e-4, 1e-4, 1e-4])


def test_momenta_from_1_on_are_refused_and_clipping_can_be_switched_off():
    with pytest.raises(NnsslError, match=r"--optim\.betas"):
        OptimSettings(betas=(1.5, 0.9))
    assert OptimSettings(clip=float("inf")).clip == float("inf")


def test_a_warm_up_of_one_or_more_counts_steps():
    rate = schedule(1000, lr=1.0, warmup=4.0).learning_rate
    assert [rate(step) for step in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


def test_the_peak_follows_the_batch_and_the_final_rate_does_not():
    # 3DINO's: .002 at 1024, square root, 512 cases: 1.41e-3, down to an absolute 1e-6
    sqrt = schedule(100, 512, lr=0.002, lr_scaling="sqrt", lr_batch=1024, schedule="cosine", warmup=0.1)
    assert sqrt.peak == pytest.approx(1.414e-3, rel=1e-3)
    assert sqrt.learning_rate(9) == pytest.approx(sqrt.peak)
    assert sqrt.learning_rate(100) == pytest.approx(1e-6)
    assert schedule(100, 64, lr=0.05, lr_scaling="linear", lr_batch=256).peak == pytest.approx(0.0125)
    assert schedule(100, 64, lr=0.05, lr_batch=256).peak == 0.05
    with pytest.raises(NnsslError, match=r"--optim\.lr_batch None with --optim\.lr_scaling linear"):
        _ = schedule(100, 64, lr_scaling="linear", lr_batch=None).peak


def test_weight_decay_is_constant_or_a_cosine_over_the_whole_run():
    moving = schedule(10, weight_decay=0.04, weight_decay_end=0.4, warmup=0.5)
    assert [moving.weight_decay(step) for step in (0, 5, 10)] == pytest.approx([0.04, 0.22, 0.4])
    assert schedule(10, weight_decay=0.04).weight_decay(7) == 0.04


class Student(nn.Module):
    """Every sort of parameter: kernels, a token, vectors, a weight-normed matrix with its gain, a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(1, 2, 3)
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.norm = nn.LayerNorm(4)
        self.head = nn.utils.parametrizations.weight_norm(nn.Linear(4, 6, bias=False))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


def group_of(optimizer: torch.optim.Optimizer, module: nn.Module, name: str) -> dict:
    parameter = dict(module.named_parameters())[name]
    (found,) = [g for g in optimizer.param_groups if any(p is parameter for p in g["params"])]
    return found


def test_only_vectors_are_not_decayed_and_no_parameter_is_lost():
    student = Student()
    optim = OptimSettings(weight_decay=0.04, weight_decay_end=0.4)
    optimizer = build_optimizer(student, optim)
    Schedule(optim, 10, 1).apply(optimizer, 10)
    decay = {
        n: group_of(optimizer, student, n)["weight_decay"] for n, p in student.named_parameters() if p.requires_grad
    }
    assert decay == pytest.approx(
        {
            "token": 0.4,
            "stem.weight": 0.4,
            "stem.bias": 0,
            "norm.weight": 0,
            "norm.bias": 0,
            "head.parametrizations.weight.original0": 0.4,  # the gain g, (6, 1), decays in DINOv2 too
            "head.parametrizations.weight.original1": 0.4,
        }
    )
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(decay)


def test_rules_multiply_hold_and_freeze_learning_rates():
    student = Student()
    rules = (
        OptimRule("stem.", lr_scale=0.5),
        OptimRule("stem.weight", lr_scale=0.2),
        OptimRule("norm.", constant=True),
        OptimRule("head.", frozen_steps=3),
    )
    optim = OptimSettings(lr=1.0, warmup=0.0, schedule="poly")
    optimizer, plan = build_optimizer(student, optim, rules), Schedule(optim, 10, 1)

    def rates(step: int) -> dict[str, float]:
        plan.apply(optimizer, step)
        names = ("token", "stem.weight", "stem.bias", "norm.weight", "head.parametrizations.weight.original1")
        return {name.split(".parametrizations")[0]: group_of(optimizer, student, name)["lr"] for name in names}

    now = 0.8**0.9  # two tenths are done
    assert rates(2) == pytest.approx(
        {"token": now, "stem.weight": 0.1 * now, "stem.bias": 0.5 * now, "norm.weight": 1.0, "head": 0.0}
    )
    assert rates(3)["head"] == pytest.approx(0.7**0.9)


def test_a_frozen_layer_keeps_its_adam_state_and_does_not_move():
    student = Student()
    optim = OptimSettings(weight_decay=0.1)
    optimizer = build_optimizer(student, optim, (OptimRule("head.", frozen_steps=2),))
    before = student.head.weight.detach().clone()
    plan = Schedule(optim, 10, 1)
    for step in range(3):
        student.head(torch.ones(1, 4)).sum().backward()
        plan.apply(optimizer, step)
        optimizer.step()
        assert torch.equal(before, student.head.weight) == (step < 2)
    gain = student.head.parametrizations.weight.original0
    assert optimizer.state[gain]["step"] == 3 and float(optimizer.state[gain]["exp_avg"].abs().sum()) > 0


def test_rules_survive_saving_and_loading_the_optimiser():
    student, rules = Student(), (OptimRule("stem.", lr_scale=0.5), OptimRule("norm.", constant=True, frozen_steps=4))
    first, second = (build_optimizer(student, OptimSettings(), rules) for _ in range(2))
    second.load_state_dict(first.state_dict())
    for a, b in zip(first.param_groups, second.param_groups, strict=True):
        assert {k: v for k, v in a.items() if k != "params"} == {k: v for k, v in b.items() if k != "params"}
    assert group_of(second, student, "norm.bias")["frozen_steps"] == 4


def test_a_rule_for_no_parameter_is_named():
    with pytest.raises(NnsslError, match=r"Student has an optimiser rule for 'steam\.'"):
        parameter_groups(Student(), (OptimRule("steam.", lr_scale=0.2),))


def test_optimisers_take_the_settings():
    module = nn.Linear(2, 2)
    for kind, nesterov in (("sgd", False), ("nesterov", True)):
        sgd = build_optimizer(module, OptimSettings(optimizer=kind, lr=0.01, betas=(0.99, 0.0)))
        assert isinstance(sgd, torch.optim.SGD)
        assert (sgd.defaults["momentum"], sgd.defaults["nesterov"]) == (0.99, nesterov)
    adamw = build_optimizer(module, OptimSettings(betas=(0.9, 0.98)))
    assert isinstance(adamw, torch.optim.AdamW)
    assert adamw.defaults["betas"] == (0.9, 0.98)


class TwoModules(nn.Module):
    """A backbone, and a head that also holds the backbone, as a masked autoencoder's."""

    def __init__(self, backbone: list[float], head: list[float]) -> None:
        super().__init__()
        self.backbone, self.head = nn.Module(), nn.Module()
        self.backbone.weight = nn.Parameter(torch.zeros(2))
        self.head.backbone, self.head.weight = self.backbone, nn.Parameter(torch.zeros(2))
        self.unused = nn.Parameter(torch.zeros(2))
        self.backbone.weight.grad, self.head.weight.grad = torch.tensor(backbone), torch.tensor(head)


def test_gradients_are_clipped_together_per_child_module_or_each():
    together = TwoModules([3.0, 4.0], [0.0, 12.0])
    assert float(clip_gradients(together, OptimSettings(clip=1.3))) == pytest.approx(13)
    torch.testing.assert_close(together.backbone.weight.grad, torch.tensor([0.3, 0.4]))
    torch.testing.assert_close(together.head.weight.grad, torch.tensor([0.0, 1.2]))
    apart = TwoModules([3.0, 4.0], [0.0, 2.0])
    assert float(clip_gradients(apart, OptimSettings(clip=3.0, clip_by="module"))) == pytest.approx(29**0.5)
    torch.testing.assert_close(apart.backbone.weight.grad, torch.tensor([1.8, 2.4]))
    torch.testing.assert_close(apart.head.weight.grad, torch.tensor([0.0, 2.0]))
    apart = TwoModules([3.0, 4.0], [0.0, 2.0])
    apart.head.bias = nn.Parameter(torch.zeros(2))
    apart.head.bias.grad = torch.tensor([6.0, 8.0])
    assert float(clip_gradients(apart, OptimSettings(clip=3.0, clip_by="parameter"))) == pytest.approx(129**0.5)
    torch.testing.assert_close(apart.backbone.weight.grad, torch.tensor([1.8, 2.4]))
    torch.testing.assert_close(apart.head.weight.grad, torch.tensor([0.0, 2.0]))
    torch.testing.assert_close(apart.head.bias.grad, torch.tensor([1.8, 2.4]))


@pytest.mark.parametrize("clip_by", ["all", "module", "parameter"])
def test_a_gradient_that_is_not_finite_shows_in_the_norm(clip_by):
    module = TwoModules([1.0, 2.0], [float("nan"), 0.0])
    assert not torch.isfinite(clip_gradients(module, OptimSettings(clip_by=clip_by)))
