"""vox2vec and its hierarchical successor: what they share, and what is left when an ingredient is switched off."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from preprocessed_cases import save_case
from scipy.ndimage import gaussian_filter
from tiny_dataset import BACKBONES, job_of, plans_of, write_dataset
from torch.nn import functional as F

from nnssl_ext.checkpoints.io import load_checkpoint
from nnssl_ext.contracts import HounsfieldScale
from nnssl_ext.data.cases import list_cases
from nnssl_ext.data.intensity_scale import ScaleSettings
from nnssl_ext.data.loader import make_loader
from nnssl_ext.engine import loop
from nnssl_ext.geometry.voxel_pairs import sample_pairs
from nnssl_ext.networks.build import build_backbone
from nnssl_ext.networks.dense_contrast import ContrastSettings
from nnssl_ext.plans import pretrain_plan
from nnssl_ext.records import View
from nnssl_ext.trainers.pretraining.hierarchical_dense import HierarchicalDenseSettings, HierarchicalDenseTrainer
from nnssl_ext.trainers.pretraining.vox2vec import Vox2VecTrainer
from nnssl_ext.views.anchored_pairs import body_mask, joined
from nnssl_ext.views.cut import cut_views
from nnssl_ext.views.policies import SpatialSettings

KINDS = {"vox2vec": Vox2VecTrainer, "hierarchical": HierarchicalDenseTrainer}
EVERY_PAIR = [(kind, backbone) for kind in KINDS for backbone in BACKBONES]
CROP = (16, 16, 16)
FEW = ContrastSettings(voxels=40)
TURNED = SpatialSettings(flip=(0.5,) * 3, rot90=(0.5,) * 3, rotation=1.0, zoom=1.0)


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Two cases of smooth noise in air."""
    folder, rng = tmp_path_factory.mktemp("cases"), np.random.default_rng(0)
    for name in ("a", "b"):
        image = gaussian_filter(rng.normal(size=(28, 26, 30)), 1.5) * 8
        image[:, :8] = -6 + 0.1 * rng.normal(size=(28, 8, 30))
        save_case(folder, name, image[None].astype(np.float32))
    return list_cases(folder, (1.0, 1.0, 1.0))


def method_of(kind: str = "vox2vec", backbone: str = "PrimusTiny", **changes):
    torch.manual_seed(0)
    plans = plans_of(backbone)
    if backbone.startswith("Primus"):
        plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"] |= {"drop_path_rate": 0.0}
    plan = pretrain_plan(plans, "3d_fullres", 1)
    defaults = {"crop": CROP, "pairs": 2, "contrast": FEW}
    settings = KINDS[kind].settings_type(**{**defaults, **changes})
    return KINDS[kind](settings, build_backbone(plans, "3d_fullres", 1), plan)


def views_of(method, cases, seed: int = 0) -> tuple[View, ...]:
    batches = make_loader(cases, method.view_policy, seed=seed, start_step=0, steps=1, batch_size=len(cases))
    return cut_views(next(iter(batches)), torch.device("cpu"))


def vox2vec_like(**changes) -> dict:
    """Settings with which the hierarchical method has none of its three ingredients."""
    return {"balance": "none", "local": False, "restoration": 0.0, "scale": ScaleSettings(), **changes}


@pytest.mark.parametrize(("kind", "backbone"), EVERY_PAIR)
@pytest.mark.parametrize("spatial", [None, TURNED])
def test_the_contrast_is_nt_xent_of_concatenated_and_projected_levels(cases, kind, backbone, spatial):
    """The same with loops over voxels, levels and embeddings."""
    method = method_of(kind, backbone, **({} if spatial is None else {"spatial": spatial}))
    views = views_of(method, cases)
    step = method(views)
    found = step.terms["contrast"] if "contrast" in step.terms else step.loss.detach()
    firsts, seconds = views[0::2], views[1::2]
    with torch.no_grad():
        voxels = torch.cat([view.voxels for view in (*firsts, *seconds)])
        features = method.backbone.forward_features(voxels)
        decoded = method.backbone.forward_decoder(features)
    levels = [*zip(decoded.levels, decoded.strides, strict=True), (features.levels[-1], features.strides[-1])]
    vectors: dict[str, list[list[torch.Tensor]]] = {"first": [], "second": []}
    for number, (first, second) in enumerate(zip(firsts, seconds, strict=True)):
        seeds = [int(facts["voxel_seed"]) for facts in first.applied]
        pairs = sample_pairs(first, second, body_mask(first), FEW.voxels, (1, 1, 1), seeds)
        for row in range(len(cases)):
            for side, places in enumerate((pairs.first, pairs.second_voxel)):
                image = (side * len(firsts) + number) * len(cases) + row
                rows = []
                for z, y, x in places[row, pairs.valid[row]].tolist():
                    parts = [m[image, :, z // s[0], y // s[1], x // s[2]] for m, s in levels]
                    if method.balance is not None:
                        parts = [linear(part) for linear, part in zip(method.balance.levels, parts, strict=True)]
                    rows.append(torch.cat(parts))
                vectors[("first", "second")[side]].append(rows)
    embedded = {}
    for side, lists in vectors.items():
        flat = torch.stack([row for rows in lists for row in rows])
        for linear, norm in zip(method.projector.hidden, method.projector.norms, strict=True):
            flat = F.batch_norm(linear(flat), None, None, norm.weight, norm.bias, training=True).relu()
        embedded[side] = F.normalize(method.projector.out(flat)).split([len(rows) for rows in lists])
    losses = []
    for row in range(len(cases)):
        both = [torch.cat(embedded[side][row :: len(cases)]) for side in ("first", "second")]
        similar = torch.cat(both) @ torch.cat(both).T / 0.1
        n = len(both[0])
        for i in range(2 * n):
            others = torch.cat((similar[i, :i], similar[i, i + 1 :]))
            losses.append((row, others.logsumexp(0) - similar[i, (i + n) % (2 * n)]))
    expected = torch.stack([torch.stack([v for r, v in losses if r == row]).mean() for row in range(len(cases))]).mean()
    torch.testing.assert_close(found, expected.detach(), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_without_its_three_ingredients_the_successor_is_vox2vec_exactly(cases, backbone):
    vox2vec, successor = method_of("vox2vec", backbone), method_of("hierarchical", backbone, **vox2vec_like())
    assert successor.view_policy == vox2vec.view_policy
    assert successor.state_dict().keys() == vox2vec.state_dict().keys()
    successor.load_state_dict(vox2vec.state_dict())
    views = views_of(vox2vec, cases)
    first, second = vox2vec(views), successor(views)
    assert torch.equal(first.loss, second.loss)
    first.loss.backward()
    second.loss.backward()
    for (name, a), (_, b) in zip(vox2vec.named_parameters(), successor.named_parameters(), strict=True):
        assert (a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad), name


def test_every_ingredient_alone_changes_the_loss(cases):
    plain = method_of("hierarchical", **vox2vec_like())
    base = plain(views_of(plain, cases)).loss
    for change in ({"balance": "trained"}, {"local": True}, {"restoration": 10.0}):
        method = method_of("hierarchical", **vox2vec_like(**change))
        assert method(views_of(method, cases)).loss != base, change


@pytest.mark.parametrize(("kind", "backbone"), EVERY_PAIR)
@pytest.mark.parametrize("decoder", [True, False])
def test_the_trained_parts_are_the_ones_that_get_a_gradient(cases, kind, backbone, decoder):
    changes = {"contrast": replace(FEW, decoder=decoder)} | (
        {} if decoder or kind == "vox2vec" else {"restoration": 0.0}
    )
    method = method_of(kind, backbone, **changes)
    method(views_of(method, cases)).loss.backward()
    for name, parameter in method.backbone.network.named_parameters():
        assert name.startswith(method.pretrained_prefixes) == (parameter.grad is not None), name
    assert any("decoder" in prefix for prefix in method.pretrained_prefixes) or not decoder
    assert method.cell == method.levels(torch.zeros(1, 1, *CROP))[1].strides[0]
    assert all(parameter.grad is not None for parameter in method.projector.parameters())


def test_tokens_without_finer_levels_give_at_most_one_voxel_each(cases):
    method = method_of(contrast=ContrastSettings(voxels=1000, decoder=False))
    step = method(views_of(method, cases))
    assert 0 < step.terms["voxels"] <= 4**3
    finer = method_of(contrast=ContrastSettings(voxels=1000))
    assert finer(views_of(finer, cases)).terms["voxels"] > 4**3


@pytest.mark.parametrize("backbone", BACKBONES)
def test_levels_have_equal_widths_and_their_shares_are_logged(cases, backbone):
    method = method_of("hierarchical", backbone, width=32)
    assert method.projector.out.in_features == 32 * 3 == 32 * len(method.balance.levels)
    for kind in KINDS:
        step = method_of(kind, backbone)(views_of(method, cases))
        shares = [float(step.terms[f"share_level{number}"]) for number in range(3)]
        assert sum(shares) == pytest.approx(1, abs=1e-5) and min(shares) > 0


@pytest.mark.parametrize("balance", ["trained", "frozen"])
def test_projections_of_levels_are_saved_and_move_only_if_trained(nnunet_env, balance):
    write_dataset(nnunet_env.preprocessed)
    flags = (
        "--balance",
        balance,
        "--epochs",
        "1",
        "--iterations",
        "2",
        "--contrast.voxels",
        "32",
        "--probe_epochs",
        "0",
    )
    job = job_of(*flags, method="HierarchicalDenseTrainer", backbone="ResEncTiny")
    fresh = loop.build_method(job).balance.state_dict()
    assert loop.pretrain(job)
    saved = load_checkpoint(job.output / "checkpoint_latest.pth")["resume"]["method"]
    assert len(fresh) == 2 * 3
    for name, value in fresh.items():
        assert torch.equal(saved[f"balance.{name}"], value) == (balance == "frozen"), name


@pytest.mark.parametrize("backbone", BACKBONES)
def test_restoration_is_scored_against_both_clean_crops(cases, backbone):
    method = method_of("hierarchical", backbone)
    views = views_of(method, cases)
    assert all(not torch.equal(view.voxels, view.clean) for view in views)
    first, second = joined(views[0::2]), joined(views[1::2])
    clean, corrupted = torch.cat((first.clean, second.clean)), torch.cat((first.voxels, second.voxels))
    for restored in (clean, corrupted, torch.cat((first.clean, second.voxels))):
        method.restore.forward = lambda level, restored=restored: restored
        error = method(views).terms["restoration"]
        expected = (restored - clean).square().mean() / 25  # black to white is 5 standard deviations
        torch.testing.assert_close(error, expected)
    step = method(views)
    torch.testing.assert_close(step.loss.detach(), step.terms["contrast"] + 10 * step.terms["restoration"])


def test_ct_is_restored_within_the_papers_window(cases):
    """Of one voxel in four soft tissue is wrong by 85 HU, a fifth of the window; air and bone are black and white, not more."""
    torch.manual_seed(0)
    plans = plans_of("PrimusTiny")
    scale = HounsfieldScale(mean=50.0, std=100.0, lower=-900.0, upper=1100.0)
    plan = replace(pretrain_plan(plans, "3d_fullres", 1), hounsfield=(scale,))
    settings = HierarchicalDenseSettings(crop=CROP, pairs=2, contrast=FEW)
    method = HierarchicalDenseTrainer(settings, build_backbone(plans, "3d_fullres", 1), plan)
    views = views_of(method, cases)
    hu = torch.tensor([-900.0, 1100.0, 30.0, 30.0]).view(1, 1, 4, 1, 1).repeat(1, 1, 4, 16, 16)
    restored = torch.tensor([-175.0, 250.0, 30.0, 115.0]).view(1, 1, 4, 1, 1).repeat(1, 1, 4, 16, 16)
    for view in views:
        view.clean.copy_((hu - scale.mean) / scale.std)
    method.restore.forward = lambda level: ((restored - scale.mean) / scale.std).expand(8, -1, -1, -1, -1)
    torch.testing.assert_close(method(views).terms["restoration"], torch.tensor(0.2**2 / 4))


def test_padding_is_not_restored(cases):
    method = method_of("hierarchical", crop=(32, 16, 16))  # two voxels of padding at both ends of 28
    views = views_of(method, cases)
    wrong = torch.zeros(8, 1, 32, 16, 16)
    wrong[:, :, :2] = wrong[:, :, 30:] = 100.0
    first, second = joined(views[0::2]), joined(views[1::2])
    method.restore.forward = lambda level: torch.cat((first.clean, second.clean)) + wrong
    assert method(views).terms["restoration"] == 0


def test_the_restorations_gradient_does_not_reach_the_projections(cases):
    method = method_of("hierarchical")
    step = method(views_of(method, cases))
    heads = [*method.projector.parameters(), *method.balance.parameters()]
    found = torch.autograd.grad(step.parts["restoration"], heads, allow_unused=True, retain_graph=True)
    assert all(gradient is None for gradient in found)
    shared = next(method.backbone.network.eva.blocks.parameters())
    for part in step.parts.values():
        assert torch.autograd.grad(part, shared, retain_graph=True)[0].any()


@pytest.mark.parametrize(("kind", "backbone"), EVERY_PAIR)
def test_empty_crops_give_finite_losses_and_gradients(cases, kind, backbone):
    method = method_of(kind, backbone)
    views = views_of(method, cases)
    zeros = torch.zeros_like(views[0].voxels)
    for body in (-1.0, 1.0):  # all of it is body, none of it is
        facts = tuple({**facts, "body": body} for facts in views[0].applied)
        empty = tuple(replace(view, voxels=zeros.clone(), clean=zeros, applied=facts) for view in views)
        step = method(empty)
        step.loss.backward()
        assert torch.isfinite(step.loss)
        assert all(torch.isfinite(p.grad).all() for p in method.parameters() if p.grad is not None)
        if kind == "vox2vec" and body > 0:
            assert step.loss == 0


@pytest.mark.parametrize("kind", KINDS)
def test_looking_and_drawing_leave_weights_and_norms_as_they_are(cases, kind):
    method = method_of(kind, "ResEncTiny")
    views = views_of(method, cases)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    shown = method.pictures(views)
    with torch.no_grad():
        method.export_backbone().forward_features(views[0].voxels)
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())
    assert all(volume.shape[2:] == CROP for volume in shown.values())
    if kind == "hierarchical":
        assert torch.equal(shown["crop"], views[0].clean) and torch.equal(shown["corrupted"], views[0].voxels)


@pytest.mark.parametrize(("kind", "backbone"), EVERY_PAIR)
def test_a_batch_can_be_learnt_by_heart(cases, kind, backbone):
    method = method_of(kind, backbone)
    views = views_of(method, cases)
    optimizer = torch.optim.Adam(method.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        step = method(views)
        step.loss.backward()
        optimizer.step()
        losses.append(float(step.terms.get("contrast", step.loss)))
    assert losses[0] > 2 and losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_under_bf16_autocast_the_loss_is_float32_and_near_that_of_float32(cases, backbone):
    method = method_of("hierarchical", backbone)
    views = views_of(method, cases)
    exact = method(views).loss.item()
    with torch.backends.mkldnn.flags(enabled=False):  # see test_pretraining_simsiam
        with torch.autocast("cpu", torch.bfloat16):
            loss = method(views).loss
        loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact, rel=0.03)
    assert all(torch.isfinite(p.grad).all() for p in method.parameters() if p.grad is not None)
