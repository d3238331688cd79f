"""DINO3DTrainer and IBOTTrainer: what a step sees and says. Rows are those of the table of usual errors in DINOv2 ports that the
losses' and networks' own tests do not cover; the engine's tests train, resume, accumulate and replicate every method."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from self_distillation_helpers import EVERY_PAIR, batch_of, method_of, record_calls, views_of
from tiny_dataset import BACKBONES, CROP, plans_of

from nnssl_ext.contracts import Method, Progress
from nnssl_ext.errors import NnsslError
from nnssl_ext.networks.build import build_backbone
from nnssl_ext.networks.student_teacher import TeacherSettings, dense_level
from nnssl_ext.objectives.dino import dino_loss
from nnssl_ext.objectives.ibot import ibot_loss
from nnssl_ext.plans import pretrain_plan
from nnssl_ext.trainers.pretraining.dino3d import DINO3DSettings, DINO3DTrainer
from nnssl_ext.trainers.pretraining.ibot import IBOTSettings, IBOTTrainer


@pytest.mark.parametrize(("kind", "backbone"), EVERY_PAIR)
def test_row_1_the_teacher_starts_as_the_student_heads_included(kind, backbone, tmp_path):
    method = method_of(kind, backbone, network={"drop_path_rate": 0.0} if backbone == "PrimusTiny" else ())
    assert isinstance(method, Method)
    student, teacher = method.student(), method.teacher.parts
    assert list(student) == list(teacher)
    for (name, mine), theirs in zip(student.state_dict().items(), teacher.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name
    view = views_of(method, tmp_path)[0]
    with torch.no_grad():
        for parts in (student, teacher):
            parts.logits = parts["head"](parts["backbone"].forward_features(view.voxels).summary)
    assert torch.equal(student.logits, teacher.logits)


@pytest.mark.parametrize(("kind", "backbone"), EVERY_PAIR)
def test_row_2_training_mode_never_reaches_the_teacher(kind, backbone):
    method = method_of(kind, backbone).train()
    assert method.backbone.training and method.head.training
    assert not any(module.training for module in method.teacher.modules())
    assert not any(parameter.requires_grad for parameter in method.teacher.parameters())


@pytest.mark.parametrize(("kind", "backbone"), EVERY_PAIR)
def test_rows_4_and_24_one_pass_over_masked_globals_one_over_locals_one_of_the_teacher(
    kind, backbone, monkeypatch, tmp_path
):
    method = method_of(kind, backbone, crops=replace(method_of(kind).settings.crops, local_views=8))
    student = record_calls(monkeypatch, method.backbone, "forward_features")
    teacher = record_calls(monkeypatch, method.teacher_backbone, "forward_features")
    head = record_calls(monkeypatch, method.head, "forward")
    views = views_of(method, tmp_path, batch=3)
    method(views)
    (crops, mask), (local, *no_mask) = student
    assert crops.shape == (6, 1, *CROP) and local.shape == (24, 1, 8, 8, 8) and not no_mask
    assert torch.equal(crops, torch.cat([view.voxels for view in views[:2]]))
    hidden = mask.flatten(1).sum(1).view(2, 3)  # view by view
    assert torch.equal((hidden > 0).sum(0), torch.ones(3, dtype=torch.int64))  # of each case, one of two
    ((whole, *no_mask),) = teacher
    assert whole is crops and not no_mask
    assert head[0][0].shape[0] == 30  # all crops at once


@pytest.mark.parametrize(("kind", "low", "high"), [(DINO3DTrainer, 0.2, 0.75), (IBOTTrainer, 0.1, 0.5)])
def test_rows_5_and_6_the_number_of_hidden_tokens_varies_little_and_its_mean_is_the_ranges(kind, low, high, tmp_path):
    method = method_of(kind, crops=replace(method_of(kind).settings.crops, global_crop=(24, 24, 24), local_views=0))
    cells, batch = 6**3, 8
    totals = []
    for seed in range(30):
        draws = batch_of(method, tmp_path, batch, seed).draws
        totals.append(sum(int(view.mask.sum()) for views in draws for view in views if view.mask is not None))
    bound = cells * (batch * low + (high - low) * (batch + 1) / 2)
    assert max(totals) <= bound
    assert np.mean(totals) / (batch * cells) == pytest.approx((low + high) / 2, rel=0.02)
    independent = cells * (high - low) / math.sqrt(12) * math.sqrt(batch)
    assert np.std(totals) < independent / 4


@pytest.mark.parametrize(("kind", "backbone"), EVERY_PAIR)
def test_row_7_only_hidden_tokens_go_through_the_heads(kind, backbone, monkeypatch, tmp_path):
    method = method_of(kind, backbone)
    calls = [
        record_calls(monkeypatch, p[method.token_head], "forward") for p in (method.student(), method.teacher.parts)
    ]
    views = views_of(method, tmp_path)
    step = method(views)
    hidden = sum(int(view.mask.sum()) for view in views[:2])
    level = dense_level(method.backbone)
    for rows in ([x for (x,) in made if len(x) == hidden] for made in calls):
        assert len(rows) == 1 and rows[0].shape == (hidden, method.backbone.channels[level])
    assert step.watch["patch_prototypes"].shape == (64,)


@pytest.mark.parametrize("kind", [DINO3DTrainer, IBOTTrainer])
def test_row_8_the_mask_token_is_learned_starts_at_zero_and_stands_before_positions(kind, tmp_path):
    method = method_of(kind)
    token = method.backbone.mask_token
    assert token.requires_grad and float(token.detach().abs().sum()) == 0
    method(views_of(method, tmp_path)).loss.backward()
    assert float(token.grad.norm()) > 0
    hidden = torch.ones(1, 4, 4, 4, dtype=torch.bool)
    with torch.no_grad():
        tokens = method.backbone.eval().forward_features(torch.randn(1, 1, *CROP), hidden).levels[0]
    assert float(tokens.flatten(2).std(dim=2).max()) > 0  # places differ although all are hidden


@pytest.mark.parametrize("backbone", BACKBONES)
def test_hidden_places_are_matched_with_the_teachers_same_places(backbone, monkeypatch, tmp_path):
    """If the student says at every place what the teacher says there, the iBOT term is the teacher's entropy, halved."""
    method = method_of(
        IBOTTrainer,
        backbone,
        network={"drop_path_rate": 0.0} if backbone == "PrimusTiny" else (),
        student_temperature=0.05,
        teacher=TeacherSettings(temperature=(0.05, 0.05), centring="none", patch_centring="none"),
    )
    blind = method.backbone.forward_features
    monkeypatch.setattr(method.backbone, "forward_features", lambda x, mask=None: blind(x))  # nothing is hidden
    method.before_step(Progress(0, 10))
    step = method(views_of(method, tmp_path, batch=4))
    uniform = math.log(64)
    # per crop means: the log's entropy pools tokens of all crops, so it agrees only roughly
    assert float(step.terms["ibot"]) / uniform == pytest.approx(float(step.terms["patch_entropy"]) / 2, rel=0.05)
    shuffled = method.passes(views_of(method, tmp_path, batch=4)).hidden
    torch.testing.assert_close(shuffled.student, shuffled.teacher)


def test_row_10_koleo_spreads_the_backbones_features_of_global_crops(monkeypatch, tmp_path):
    method = method_of(ibot_weight=0.5, koleo_weight=0.25)
    views = views_of(method, tmp_path, batch=4)
    passes = method.passes(views)
    found = record_calls(monkeypatch, method_module(), "koleo_loss")
    step = method.eval()(views)
    ((features,),) = found
    assert features.shape == (2, 4, 24) == passes.summaries.shape
    assert features.requires_grad
    total = step.terms["dino"] + 0.5 * step.terms["ibot"] + 0.25 * step.terms["koleo"]
    torch.testing.assert_close(step.loss.detach(), total)


def test_ibot_centres_crops_and_tokens_by_themselves_and_weighs_both_terms_alike(monkeypatch, tmp_path):
    """Zhou et al., Sec. 3.2. Student and teacher have temperatures of their own."""
    method = method_of(
        IBOTTrainer,
        student_temperature=0.2,
        teacher=TeacherSettings(temperature=(0.05, 0.05), centring="centre", patch_centring="centre"),
    ).eval()
    views, ramp = views_of(method, tmp_path), torch.linspace(-1, 1, 64)
    method.before_step(Progress(0, 10))
    with torch.no_grad():
        method.crop_targets.centre += ramp
        method.token_targets.centre -= ramp
    passes = method.passes(views)
    monkeypatch.setattr(method, "passes", lambda _: passes)
    step, hidden = method(views), passes.hidden
    dino = dino_loss(passes.student, ((passes.teacher - ramp) / 0.05).softmax(-1), 0.2)
    tokens = ((hidden.teacher + ramp) / 0.05).softmax(-1)
    ibot = ibot_loss(hidden.student, tokens, hidden.weights, 4, 0.2)  # of 2 cases 2 global crops each
    torch.testing.assert_close(step.terms["dino"], dino.detach())
    torch.testing.assert_close(step.terms["ibot"], ibot.detach())
    torch.testing.assert_close(step.loss, dino + ibot)


def method_module():
    import nnssl_ext.trainers.pretraining.dino3d as module

    return module


@pytest.mark.parametrize("size", [(16, 16, 16), (8, 8, 8), (8, 12, 24)])
def test_row_23_crops_of_any_multiple_of_the_token_are_encoded(size, tmp_path):
    method = method_of(crops=replace(method_of().settings.crops, local_crop=size))
    step = method(views_of(method, tmp_path))
    step.loss.backward()
    assert float(method.backbone.network.eva.pos_embed.grad.norm()) > 0


@pytest.mark.parametrize(("kind", "backbone"), EVERY_PAIR)
def test_what_is_logged_and_watched(kind, backbone, tmp_path):
    method = method_of(kind, backbone)
    method.before_step(Progress(3, 10))
    step = method.eval()(views_of(method, tmp_path))
    terms = {name: float(value) for name, value in step.terms.items()}
    assert terms["momentum"] == pytest.approx(method.settings.teacher.momentum_at(Progress(3, 10)))
    assert terms["teacher_temperature"] == pytest.approx(method.settings.teacher.temperature_at(Progress(3, 10)))
    assert terms["teacher_distance"] == 0
    assert terms["dino_of_ln_k"] == pytest.approx(terms["dino"] / math.log(64))
    assert terms["kl"] == pytest.approx(terms["dino"] - terms["teacher_entropy"] * math.log(64), abs=1e-4)
    assert 0 < terms["teacher_entropy"] < 1 and 0 < terms["patch_entropy"] < 1
    shapes = {name: tuple(value.shape) for name, value in step.watch.items()}
    width = method.backbone.channels[-1]
    assert shapes["features"] == (4, width) and shapes["prototypes"] == (64,) == shapes["patch_prototypes"]
    assert shapes["tokens"] == (4, 64, width)  # the tiny networks' only level of stride 4 or more is the last
    assert float(step.watch["prototypes"].sum()) == pytest.approx(1, abs=1e-4)
    assert not any(value.requires_grad for value in [*step.terms.values(), *step.watch.values()])
    assert all(part.requires_grad for part in step.parts.values())
    method.after_step(Progress(4, 10))
    with torch.no_grad():
        method.backbone.network.get_parameter(method.backbone.network.keys_to_in_proj[0] + ".weight").mul_(2)
    method.before_step(Progress(4, 10))
    assert float(method.distance) > 0


@pytest.mark.parametrize(("kind", "backbone"), EVERY_PAIR)
def test_bfloat16_agrees_with_float32(kind, backbone, tmp_path):
    method = method_of(kind, backbone).eval()
    method.before_step(Progress(0, 10))
    views = views_of(method, tmp_path, batch=4)
    with torch.no_grad():
        exact = method(views)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = method(views)
    for name in ("dino", "ibot"):
        assert rounded.terms[name].dtype == torch.float32
        assert float(rounded.terms[name]) == pytest.approx(float(exact.terms[name]), rel=0.03)


@pytest.mark.parametrize("kind", [DINO3DTrainer, IBOTTrainer])
def test_a_class_token_speaks_for_the_crop_and_is_trained(kind, tmp_path):
    method = method_of(kind, network={"class_token": True, "num_register_tokens": 2})
    method(views_of(method, tmp_path)).loss.backward()
    for name in ("class_token", "register_tokens"):
        assert float(getattr(method.backbone.network, name).grad.norm()) > 0


@pytest.mark.parametrize("backbone", BACKBONES)
def test_without_ibot_nothing_is_hidden(backbone, tmp_path):
    method = method_of(DINO3DTrainer, backbone, ibot_weight=0.0)
    views = views_of(method, tmp_path)
    assert all(view.mask is None for view in views)
    step = method(views)
    assert set(step.parts) == {"dino"} and "patch_prototypes" not in step.watch
    step.loss.backward()
    trained = [p for p in method.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)  # data-parallel training waits for each


def test_one_head_for_two_widths_is_refused(tmp_path):
    with pytest.raises(NnsslError, match="one head cannot serve") as refused:
        method_of(IBOTTrainer, "ResEncTiny", network={"strides": [[1, 1, 1], [2, 2, 2], [8, 8, 8]]}, share_head=True)
    assert "--no_share_head" in refused.value.fix


def test_crops_without_a_pair_are_refused():
    with pytest.raises(NnsslError, match="no pair"):
        replace(DINO3DSettings().crops, global_views=1, local_views=0)


def test_published_recipes_at_full_size_and_without_what_small_batches_cannot_carry():
    plan = replace(pretrain_plan(plans_of("PrimusTiny"), "3d_fullres", 1), preset="PrimusM")
    large, small = (DINO3DSettings.for_plan(replace(plan, batch_size=size)) for size in (64, 2))
    assert large == replace(DINO3DSettings(), drop_path=0.3)
    assert (large.teacher.centring, large.koleo_weight) == ("sinkhorn", 0.1)
    assert (small.teacher.centring, small.teacher.patch_centring, small.koleo_weight) == ("centre", "sinkhorn", 0.0)
    assert large.epochs * large.iterations == 125_000
    assert round(large.teacher.temperature_warmup * 125_000) == 37_500
    assert IBOTSettings.for_plan(plan) == IBOTSettings()
    assert not IBOTSettings.for_plan(replace(plan, preset="ResEncL")).share_head
    assert DINO3DSettings.for_plan(replace(plan, preset="ResEncL")).drop_path is None


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        (None, ((24, 24, 24), (12, 12, 12))),
        ((4, 4, 4), ((24, 24, 24), (12, 12, 12))),
        ((8, 8, 8), ((24, 24, 24), (16, 16, 16))),
        ((4, 16, 16), ((24, 32, 32), (12, 16, 16))),
    ],
)
def test_crops_of_the_tiny_presets_are_whole_tokens_and_no_larger_than_the_plans(token, expected):
    plan = replace(pretrain_plan(plans_of("PrimusTiny"), "3d_fullres", 1), token_size=token)
    for kind in (DINO3DSettings, IBOTSettings):
        crops = kind.for_plan(replace(plan, global_crop=(48, 48, 48), local_crop=(32, 32, 32))).crops
        assert (crops.global_crop, crops.local_crop) == expected
    small = replace(plan, global_crop=(16, 48, 48), local_crop=(8, 32, 32))
    assert DINO3DSettings.for_plan(small).crops.global_crop == (16, *expected[0][1:])


def test_plans_tell_how_large_their_tokens_are():
    plans = plans_of("PrimusTiny")
    backbone = build_backbone(plans, "3d_fullres", 1)
    assert pretrain_plan(plans, "3d_fullres", 1).token_size == backbone.token_size
    assert pretrain_plan(plans_of("ResEncTiny"), "3d_fullres", 1).token_size is None
