"""Disruptive autoencoders: what the network sees, what it is asked for, and what it is left with."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from network_plans import swin_plans
from tiny_dataset import BACKBONES, CONFIGURATION, CROP, job_of, log_of, plans_of, write_dataset

from nnssl_ext.checkpoints.io import load_checkpoint
from nnssl_ext.contracts import HounsfieldScale, PretrainPlan
from nnssl_ext.engine import loop
from nnssl_ext.errors import NnsslError
from nnssl_ext.networks.build import build_backbone
from nnssl_ext.plans import pretrain_plan
from nnssl_ext.records import Case, View
from nnssl_ext.trainers.pretraining.disruptive_ae import DisruptiveAESettings, DisruptiveAETrainer

OFF = {"noise_variance": 0.0, "downsample": (1, 1, 1), "hidden_channels": 0.0}


def plans_and_plan(backbone: str) -> tuple[dict, PretrainPlan]:
    plans = plans_of(backbone)
    if backbone.startswith("Primus"):
        plans["configurations"][CONFIGURATION]["architecture"]["arch_kwargs"] |= {"drop_path_rate": 0.0}
    return plans, pretrain_plan(plans, CONFIGURATION, 1)


def method_of(backbone: str, **settings) -> DisruptiveAETrainer:
    torch.manual_seed(0)
    plans, plan = plans_and_plan(backbone)
    return DisruptiveAETrainer(DisruptiveAESettings(**settings), build_backbone(plans, CONFIGURATION, 1), plan)


def view_of(method: DisruptiveAETrainer, modalities: tuple[str, ...] = ("MRI", "MRI"), case_shape=CROP) -> View:
    rng, size, batch = np.random.default_rng(0), method.view_policy.size, len(modalities)
    cases = [Case("case", Path(), 1, size, (1.0, 1.0, 1.0), modality) for modality in modalities]
    return View(
        voxels=torch.randn(batch, 1, *size, generator=torch.Generator().manual_seed(1)),
        affine=torch.eye(4).repeat(batch, 1, 1),
        case_shape=torch.tensor([case_shape] * batch),
        spacing=torch.ones(batch, 3),
        cases=("case",) * batch,
        applied=tuple(dict(method.view_policy.draw(case, rng, 0.5)[0].facts) for case in cases),
    )


def at_the_stem(method: DisruptiveAETrainer, view: View) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What goes into the network in a step, what its stem makes of that, and what the rest of the network gets of it."""
    seen: dict[str, torch.Tensor] = {}
    network = method.backbone.network
    stem = network.get_submodule(network.key_to_stem)
    before = stem.register_forward_pre_hook(lambda module, inputs: seen.update(image=inputs[0]))
    after = stem.register_forward_hook(lambda module, inputs, maps: seen.update(rest=maps))  # runs after the mask's
    with torch.no_grad():
        method((view,))
        before.remove()
        after.remove()
        return seen["image"], stem(seen["image"]), seen["rest"]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_channels_are_hidden_behind_the_stem_per_sample_and_in_training_only(backbone):
    method = method_of(backbone)
    view = view_of(method, ("MRI",) * 4)
    _, raw, rest = at_the_stem(method, view)
    zero = (rest == 0).flatten(2).all(2)
    assert zero.sum(1).tolist() == [int(0.6 * raw.shape[1])] * 4
    assert torch.equal(rest[~zero], raw[~zero]) and (raw[zero] != 0).flatten(1).any(1).all()
    assert len({tuple(row.tolist()) for row in zero}) > 1
    _, raw, rest = at_the_stem(method.eval(), view)
    assert torch.equal(rest, raw)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_exported_network_hides_nothing_and_keeps_its_names(backbone):
    method, untouched = method_of(backbone), method_of(backbone).backbone
    view = view_of(method)
    method((view,))
    exported = method.export_backbone()
    assert list(exported.network.state_dict()) == list(
        build_backbone(plans_of(backbone), CONFIGURATION, 1).network.state_dict()
    )
    untouched.network.get_submodule(untouched.network.key_to_stem)._forward_hooks.clear()
    with torch.no_grad():
        levels = [backbone.train().forward_features(view.voxels).levels for backbone in (exported, untouched)]
    assert all(torch.equal(a, b) for a, b in zip(*levels, strict=True))


def test_swin_unetr_hides_channels_of_its_patch_embedding_as_published():
    pytest.importorskip("monai", reason="Swin UNETR needs MONAI (extra: swin)")
    plans, plan = plans_and_plan("ResEncTiny")
    plans["configurations"][CONFIGURATION]["architecture"] = swin_plans()["configurations"]["3d_fullres"][
        "architecture"
    ]
    plan = replace(plan, global_crop=(64, 32, 32))
    method = DisruptiveAETrainer(DisruptiveAESettings(), build_backbone(plans, CONFIGURATION, 1), plan)
    _, raw, rest = at_the_stem(method, view_of(method))
    assert raw.shape == (2, 12, 32, 16, 16)
    assert (rest == 0).flatten(2).all(2).sum(1).tolist() == [7, 7]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_nothing_but_the_disrupted_crop_reaches_the_prediction(backbone):
    """Voxels that sampling leaves out may hold anything, so no skip shows the clean crop."""
    method = method_of(backbone, noise_variance=0.0)
    view = view_of(method)
    kept = torch.zeros(CROP, dtype=torch.bool)
    kept[::4, ::4, ::4] = True

    def prediction(voxels: torch.Tensor) -> torch.Tensor:
        return method.pictures((replace(view, voxels=voxels),))["restored"]

    before = prediction(view.voxels)
    assert torch.equal(before, prediction(torch.where(kept, view.voxels, 100.0)))
    assert not torch.equal(before, prediction(torch.where(kept, 100.0, view.voxels)))


def test_all_disruptions_come_in_the_stated_order():
    method = method_of("ResEncTiny")
    view = view_of(method, ("MRI",) * 16)
    image, raw, rest = at_the_stem(method, view)
    blocks = image.unfold(2, 4, 4).unfold(3, 4, 4).unfold(4, 4, 4).flatten(5)
    assert torch.equal(blocks, blocks[..., :1].expand_as(blocks))  # noise too was sampled, so it was there before
    noise = blocks[..., 0] - view.voxels[..., ::4, ::4, ::4]
    assert noise.var() == pytest.approx(0.1, rel=5 * math.sqrt(2 / noise.numel()))
    assert not torch.equal(raw, rest)


@pytest.mark.parametrize("one", ["noise_variance", "downsample", "hidden_channels", None])
def test_each_disruption_can_be_chosen(one):
    method = method_of("ResEncTiny", **{name: value for name, value in OFF.items() if name != one})
    view = view_of(method)
    image, raw, rest = at_the_stem(method, view)
    sampled = view.voxels[..., ::4, ::4, ::4]
    coarse = sampled.repeat_interleave(4, 2).repeat_interleave(4, 3).repeat_interleave(4, 4)
    changed = (image != view.voxels).float().mean()
    assert torch.equal(image, coarse) == (one == "downsample")
    assert (changed == 0) == (one in ("hidden_channels", None))
    assert (changed > 0.999) == (one == "noise_variance")
    assert torch.equal(raw, rest) == (one != "hidden_channels")


def test_noise_is_restated_for_ct_in_hounsfield_units():
    plans = plans_of("ResEncTiny")
    plan = pretrain_plan(plans, CONFIGURATION, 1)
    assert plan.hounsfield == (None,)
    plans["configurations"][CONFIGURATION]["normalization_schemes"] = ["CTNormalization", "ZScoreNormalization"]
    plans["foreground_intensity_properties_per_channel"] = {
        "0": {"mean": 50.0, "std": 250.0, "percentile_00_5": -900.0, "percentile_99_5": 1200.0},
        "1": {"mean": 3.0, "std": 7.0, "percentile_00_5": 0.0, "percentile_99_5": 20.0},
    }
    plan = pretrain_plan(plans, CONFIGURATION, 2)
    assert plan.hounsfield == (HounsfieldScale(50.0, 250.0, -900.0, 1200.0), None)
    method = DisruptiveAETrainer(DisruptiveAESettings(), build_backbone(plans, CONFIGURATION, 2), plan)
    # variance 0.1 of [-1000, 1000] HU scaled to [0, 1] is a standard deviation of 632.5 HU
    assert (method.noise_std * torch.tensor([250.0, 1.0])).tolist() == pytest.approx([632.46, 0.31623], rel=1e-4)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_clean_crop_is_the_target_on_all_voxels_padding_included(backbone, monkeypatch):
    method = method_of(backbone)
    view = view_of(method, case_shape=(10, 40, 40))  # the crop reaches beyond the case
    features = method.backbone.forward_features(view.voxels)
    monkeypatch.setattr(method, "_restore", lambda *_: (view.voxels, features))
    step = method((view,))
    assert step.loss == 0 and step.terms["disrupted"] > 0.5
    prediction = torch.randn(2, 1, *CROP, requires_grad=True)
    monkeypatch.setattr(method, "_restore", lambda *_: (prediction, features))
    loss = method((view,)).loss
    loss.backward()
    assert loss.item() == pytest.approx(float((prediction - view.voxels).abs().sum() / prediction.numel()), rel=1e-5)
    expected = (prediction - view.voxels).detach().sign() / prediction.numel()
    torch.testing.assert_close(prediction.grad, expected)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_without_disruption_one_crop_can_be_learnt_by_heart(backbone):
    method = method_of(backbone, **OFF)
    grid = torch.stack(torch.meshgrid(*[torch.linspace(0, 3, n) for n in CROP], indexing="ij"))
    view = replace(view_of(method, ("MRI",)), voxels=torch.sin(grid.sum(0))[None, None] * 2)
    optimizer = torch.optim.Adam(method.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.01, 150)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = method((view,)).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_encoder_and_decoder_get_a_gradient_and_nothing_else_of_the_network(backbone):
    method = method_of(backbone)
    method((view_of(method),)).loss.backward()
    for name, parameter in method.export_backbone().network.named_parameters():
        trained = name.startswith(method.pretrained_prefixes)
        assert trained == (parameter.grad is not None) == (".seg_layers." not in name), name


def test_modalities_are_told_apart_only_where_the_contrast_has_weight():
    mixed = ("CT", "CT", "T1", "T1")
    plain = method_of("ResEncTiny")
    step = plain((view_of(plain, mixed),))
    assert not step.parts and "contrast" not in step.terms
    method = method_of("ResEncTiny", contrast=0.03)
    view = view_of(method, mixed)
    step = method((view,))
    assert step.terms["contrast"] > 0
    torch.testing.assert_close(step.loss, step.terms["restoration"] + 0.03 * step.terms["contrast"])
    assert method((view_of(method, ("CT",) * 4),)).terms["contrast"] == 0
    # samples of one modality made alike score lower than samples of different modalities made alike
    repeated = view.voxels[[0, 0, 1, 1]]
    alike = replace(view, voxels=repeated)
    across = replace(view, voxels=repeated[[0, 2, 1, 3]])
    method.eval()
    assert method((alike,)).terms["contrast"] < method((across,)).terms["contrast"]


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_half_precision_stays_finite(backbone, kind):
    method = method_of(backbone, contrast=0.03)
    with torch.autocast("cpu", kind):
        step = method((view_of(method, ("CT", "CT", "T1")),))
    step.loss.backward()
    assert torch.isfinite(step.loss) and step.loss.dtype == torch.float32
    assert all(torch.isfinite(p.grad).all() for p in method.parameters() if p.grad is not None)


def test_pictures_show_what_training_does(monkeypatch):
    method = method_of("ResEncTiny").eval()
    view = view_of(method)
    shown = method.pictures((view,))
    assert list(shown) == ["clean", "disrupted", "restored", "error"]
    assert torch.equal(shown["clean"], view.voxels)
    method.train()
    image, _, _ = at_the_stem(method, view)
    assert torch.equal(shown["disrupted"], image)
    with torch.no_grad():
        loss = method((view,)).loss
    torch.testing.assert_close(shown["error"].mean(), loss)


def test_a_run_on_cases_of_several_modalities(nnunet_env):
    base = write_dataset(nnunet_env.preprocessed)
    description = json.loads((base / "dataset.json").read_text())
    description["case_modalities"] = {f"case_{n:02d}": "T1w" for n in range(3)}  # the others are the channel's: MRI
    (base / "dataset.json").write_text(json.dumps(description))
    flags = ("--epochs", "1", "--iterations", "2", "--batch_size", "6", "--contrast", "0.03")
    job = job_of(*flags, method="DisruptiveAETrainer", backbone="ResEncTiny")
    assert sorted(case.modality for case in job.cases) == ["MRI"] * 3 + ["T1w"] * 3
    assert loop.pretrain(job)
    (row,) = log_of(job)
    assert float(row["contrast"]) > 0 and float(row["disrupted"]) > 0
    content = load_checkpoint(job.output / "checkpoint_final.pth")
    assert all(".seg_layers." in name for name in content["nnssl_ext"]["not_pretrained"])


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"hidden_channels": 1.0}, "hidden_channels"),
        ({"noise_variance": -0.1}, "noise_variance"),
        ({"downsample": (4, 0, 4)}, "downsample"),
        ({"contrast": -1.0}, "contrast"),
        ({"temperature": 0.0}, "temperature"),
    ],
)
def test_what_cannot_work_is_refused_by_name(settings, named):
    with pytest.raises(NnsslError, match=named):
        DisruptiveAESettings(**settings)


def test_defaults_are_the_papers_and_short_for_tiny_presets():
    _, plan = plans_and_plan("ResEncTiny")
    tiny = DisruptiveAESettings.for_plan(plan)
    real = DisruptiveAESettings.for_plan(replace(plan, preset="ResEncL"))
    assert tiny.epochs * tiny.iterations == 2000
    assert (real.noise_variance, real.downsample, real.hidden_channels, real.contrast) == (0.1, (4, 4, 4), 0.6, 0.0)
    optim = real.optim
    assert (optim.optimizer, optim.lr, optim.final_lr, optim.weight_decay, optim.clip) == (
        "adamw",
        1e-4,
        1e-5,
        0.05,
        1.0,
    )
    assert real.epochs == 1000 and optim.warmup * real.epochs == pytest.approx(4) and optim.schedule == "cosine"
