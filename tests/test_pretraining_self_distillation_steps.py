"""DINO3DTrainer and IBOTTrainer: what optimiser steps move, keep and save. Rows are those of the table of usual errors in DINOv2
ports."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from self_distillation_helpers import EVERY_PAIR, batch_of, method_of, parts_of, record_calls, views_of

from nnssl_ext.contracts import Progress
from nnssl_ext.engine.optim import Schedule, build_optimizer, clip_gradients
from nnssl_ext.engine.state import TrainState
from nnssl_ext.engine.step import optimizer_step
from nnssl_ext.networks.student_teacher import TeacherSettings
from nnssl_ext.trainers.pretraining.dino3d import DINO3DSettings


def test_row_3_the_teacher_moves_once_per_optimiser_step_after_it(monkeypatch, tmp_path):
    recipe = DINO3DSettings().optim
    teacher = replace(method_of().settings.teacher, momentum=(0.5, 1.0))
    method = method_of(optim=replace(recipe, accumulate=3, lr=0.2, warmup=0.0), freeze_last_layer=0, teacher=teacher)
    parts, state = parts_of(method, steps=4), TrainState()
    weight, copy = (p["backbone"].network.eva.norm.weight for p in (method.student(), method.teacher.parts))
    moves = record_calls(monkeypatch, method.teacher, "move")
    start, expected = weight.detach().clone(), weight.detach().clone()
    for step in range(4):
        assert optimizer_step(parts, [batch_of(method, tmp_path, seed=3 * step + n) for n in range(3)], state)
        momentum = 1 - 0.5 * 0.5 * (1 + math.cos(math.pi * step / 4))
        expected = momentum * expected + (1 - momentum) * weight.detach()
        torch.testing.assert_close(copy, expected)
        assert float((copy - start).abs().max()) > 1e-3  # far more than the comparison allows for
    assert len(moves) == 4
    assert float((weight - copy).detach().norm()) > 0


def test_row_11_crops_and_tokens_have_centres_of_their_own_which_move_after_the_step(tmp_path):
    centred = TeacherSettings(centring="centre", patch_centring="centre")
    method = method_of(teacher=centred)
    views = views_of(method, tmp_path)
    method.before_step(Progress(0, 10))
    method(views)
    assert float(method.crop_targets.centre.norm()) == 0 == float(method.token_targets.centre.norm())
    with torch.no_grad():
        passes = method.passes(views)
    method.after_step(Progress(1, 10))
    torch.testing.assert_close(method.crop_targets.centre, 0.1 * passes.teacher.mean((0, 1)))
    torch.testing.assert_close(method.token_targets.centre, 0.1 * passes.hidden.teacher.mean(0))


def test_rows_15_17_18_19_the_last_layer_rests_and_vectors_do_not_decay():
    recipe = DINO3DSettings()
    method = method_of(optim=recipe.optim, layer_decay=0.9, stem_scale=0.2, freeze_last_layer=3)
    optimizer = build_optimizer(method, method.settings.optim, method.optim_rules)
    schedule = Schedule(method.settings.optim, 100, 512)
    assert schedule.peak == pytest.approx(0.002 * math.sqrt(512 / 1024))  # row 21
    name_of = {id(parameter): name for name, parameter in method.named_parameters()}
    for step in (2, 3, 50):
        schedule.apply(optimizer, step)
        rate, decay = schedule.learning_rate(step), schedule.weight_decay(step)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = name_of.pop(id(parameter)) if step == 50 else name_of[id(parameter)]
                resting = ".last_layer." in name and step < 3
                scale = {"backbone.network.down_projection": 0.2 * 0.9**3, "backbone.mask_token": 0.9**3}
                scale |= {"backbone.network.eva.pos_embed": 0.9**3, "backbone.network.eva.blocks.0.": 0.9**2}
                scale |= {"backbone.network.eva.blocks.1.": 0.9}
                factor = next((value for prefix, value in scale.items() if name.startswith(prefix)), 1.0)
                assert group["lr"] == pytest.approx(0 if resting else rate * factor), name
                assert group["weight_decay"] == (decay if parameter.ndim > 1 else 0), name
    assert all(name.startswith(("teacher.", "backbone.network.decoder.")) for name in name_of.values())  # never move


def test_row_15_a_resting_last_layer_keeps_gathering_its_optimisers_statistics(tmp_path):
    method = method_of(freeze_last_layer=2)
    parts, state = parts_of(method), TrainState()
    direction = method.head.last_layer.parametrizations.weight.original1
    start, other = direction.detach().clone(), method.head.mlp[0].weight.detach().clone()
    for step in range(3):
        assert torch.equal(direction.detach(), start)
        optimizer_step(parts, [batch_of(method, tmp_path, seed=step)], state)
        assert float(parts.optimizer.state[direction]["exp_avg"].norm()) > 0
    assert not torch.equal(direction.detach(), start)
    assert not torch.equal(method.head.mlp[0].weight.detach(), other)


def test_row_20_each_network_is_clipped_on_its_own(tmp_path):
    method = method_of(optim=replace(DINO3DSettings().optim, clip=1e-3))
    method(views_of(method, tmp_path)).loss.backward()
    clip_gradients(method, method.settings.optim)
    for name in ("backbone", "head", "patch_head"):
        gradients = [p.grad for p in getattr(method, name).parameters() if p.grad is not None]
        assert float(torch.stack([g.norm() for g in gradients]).norm()) == pytest.approx(1e-3, rel=1e-2), name
    assert all(p.grad is None for p in method.teacher.parameters())


@pytest.mark.parametrize(("kind", "backbone"), EVERY_PAIR)
def test_row_26_a_step_with_nan_moves_nothing_and_leaves_nothing_behind(kind, backbone, tmp_path):
    centred = TeacherSettings(centring="centre", patch_centring="centre")
    method, clean = (method_of(kind, backbone, teacher=centred) for _ in range(2))
    parts, state = parts_of(method), TrainState()
    before = {name: value.clone() for name, value in method.state_dict().items()}
    bad = batch_of(method, tmp_path)
    bad.voxels[0] = torch.nan
    assert optimizer_step(parts, [bad], state) is None
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())
    good = batch_of(method, tmp_path, seed=1)
    assert optimizer_step(parts, [good], state)
    assert optimizer_step(parts_of(clean), [good], TrainState(step=1))
    for (name, value), other in zip(method.state_dict().items(), clean.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


@pytest.mark.parametrize(("kind", "backbone"), EVERY_PAIR)
def test_row_27_everything_is_saved_and_the_teacher_is_exported(kind, backbone, tmp_path):
    method = method_of(kind, backbone)
    parts, state = parts_of(method), TrainState()
    for step in range(2):
        optimizer_step(parts, [batch_of(method, tmp_path, seed=step)], state)
    saved = method.state_dict()
    for name in (
        "backbone.network.",
        "head.",
        "teacher.parts.backbone.network.",
        "teacher.parts.head.",
        "crop_targets.centre",
    ):
        assert any(key.startswith(name) for key in saved), name
    exported = method.export_backbone().network
    assert exported is method.teacher.parts["backbone"].network is not method.backbone.network
    twin = method_of(kind, backbone)
    twin.load_state_dict(saved)
    twin_parts = parts_of(twin)
    twin_parts.optimizer.load_state_dict(copy.deepcopy(parts.optimizer.state_dict()))
    again = TrainState(step=2)
    for current, run in ((parts, state), (twin_parts, again)):
        optimizer_step(current, [batch_of(method, tmp_path, seed=5)], run)
    for (name, value), other in zip(method.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


@pytest.mark.parametrize(("kind", "backbone"), EVERY_PAIR)
def test_every_trainable_parameter_gets_a_gradient(kind, backbone, tmp_path):
    method = method_of(kind, backbone)
    method(views_of(method, tmp_path)).loss.backward()
    assert [name for name, p in method.named_parameters() if p.requires_grad and p.grad is None] == []
