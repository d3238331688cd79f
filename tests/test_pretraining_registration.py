import numpy as np
import pytest
import torch
from tiny_dataset import BACKBONES, CONFIGURATION, plans_of, write_dataset

from nnssl_ext.checkpoints.content import checkpoint_content
from nnssl_ext.checkpoints.io import save_checkpoint
from nnssl_ext.data.cases import list_cases
from nnssl_ext.data.loader import make_loader
from nnssl_ext.engine.optim import parameter_groups
from nnssl_ext.errors import NnsslError
from nnssl_ext.networks.build import build_backbone
from nnssl_ext.plans import pretrain_plan
from nnssl_ext.registration.features import load_features
from nnssl_ext.registration.pairing import pair_crops
from nnssl_ext.registration.warp import warp
from nnssl_ext.trainers.pretraining import registration
from nnssl_ext.trainers.pretraining.registration import RegistrationSettings, RegistrationTrainer
from nnssl_ext.views.cut import cut_views
from nnssl_ext.views.recipes import NO_INTENSITY
from nnssl_ext.views.registration_pairs import RegistrationPairs, drawn_warp

SMALL = {"crop": (16, 16, 16), "places": 64, "refinement": 2}
CPU = torch.device("cpu")


def method_of(backbone="PrimusTiny", **settings) -> RegistrationTrainer:
    torch.manual_seed(0)
    plans = plans_of(backbone)
    plan = pretrain_plan(plans, CONFIGURATION, 1)
    return RegistrationTrainer(
        RegistrationSettings(**{**SMALL, **settings}), build_backbone(plans, CONFIGURATION, 1), plan
    )


@pytest.fixture
def cases(tmp_path):
    return list_cases(write_dataset(tmp_path) / "tiny_3d_fullres", (1.0, 1.0, 1.0))


def views_of(cases, policy, batch=4):
    return cut_views(next(iter(make_loader(cases, policy, seed=0, start_step=0, steps=1, batch_size=batch))), CPU)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("settings", [{}, {"labels": (1,)}, {"level": "encoder"}])
def test_the_trained_parts_are_the_ones_that_get_a_gradient(cases, backbone, settings):
    method = method_of(backbone, **settings)
    step = method(views_of(cases, method.view_policy))
    step.loss.backward()
    for name, parameter in method.backbone.network.named_parameters():
        assert name.startswith(method.pretrained_prefixes) == (parameter.grad is not None), name
    assert set(step.parts) == {"error", "contrast", *(["overlap", "segmentation"] if "labels" in settings else [])}
    assert {f"cross_{name}" for name in step.parts if name != "segmentation"} <= step.terms.keys()
    assert not any(tensor.requires_grad for tensor in (*step.terms.values(), *step.watch.values()))


def test_the_loss_weighs_its_terms_as_it_was_told(cases):
    """The displacement error counts in cells of the layer, of 4 mm here; different cases count a quarter."""
    method = method_of(labels=(1,), contrast=0.5, overlap=2.0, cross=0.25, segmentation=7.0)
    step = method(views_of(cases, method.view_policy))
    assert method.settings.layer.cell == 4
    expected = {"segmentation": 7 * step.terms["segmentation"]}
    for name, weight in {"error": 1 / 4, "contrast": 0.5, "overlap": 2.0}.items():
        expected[name] = weight * (step.terms[name] + 0.25 * step.terms[f"cross_{name}"])
    assert step.parts.keys() == expected.keys()
    for name, part in step.parts.items():
        torch.testing.assert_close(part.detach(), expected[name])
    torch.testing.assert_close(step.loss.detach(), sum(expected.values()))


def test_cases_are_registered_by_features_mind_and_labels_as_the_settings_weigh_them(cases, monkeypatch):
    method = method_of(labels=(1,), guide=0.25)
    asked, real = [], registration.find_correspondence
    monkeypatch.setattr(registration, "find_correspondence", lambda *a: asked.append((a[1], a[4])) or real(*a))
    method(views_of(cases, method.view_policy))
    assert asked
    for weights, solver in asked:
        assert list(weights) == [0.75, 0.25, 1.0]  # features, MIND, labels
        assert (solver.coarse_mm, solver.fine_mm) == (4, 2)  # cells of the layer, then of two voxels


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_layer_that_tells_labels_learns_faster_and_is_what_registration_reads(tmp_path, backbone):
    method = method_of(backbone, labels=(1, 2))
    rates = {
        id(parameter): group["lr_scale"]
        for group in parameter_groups(method, method.optim_rules)
        for parameter in group["params"]
    }
    network = method.export_backbone().network
    layer = network.decoder.seg_layers[-1]
    fast = {name for name, parameter in network.named_parameters() if rates[id(parameter)] == 10}
    assert fast == {name for name, parameter in network.named_parameters() if parameter in set(layer.parameters())}
    assert layer.weight.shape[0] == 3 and set(rates.values()) == {1, 10}
    content = checkpoint_content(
        backbone=method.export_backbone(),
        plans=plans_of(backbone),
        configuration=CONFIGURATION,
        method="RegistrationTrainer",
        settings={},
        citations=method.citations,
        pretrained_prefixes=method.pretrained_prefixes,
        data_summary={},
        progress={},
    )
    save_checkpoint(tmp_path / "labels.pth", content)
    (source,) = load_features(f"{tmp_path / 'labels.pth'}@{method.feature_level}", CPU)
    volume = torch.randn(16, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = network.eval()(volume[None, None])[0].softmax(dim=0)
    torch.testing.assert_close(source.describe(volume, (1.0, 1.0, 1.0)).values, expected)


@pytest.mark.parametrize("settings", [{}, {"labels": (1,), "segmentation": 0.0}, {"labels": (1,), "level": "encoder"}])
def test_without_that_layer_registration_reads_the_trained_map(settings):
    method = method_of("PrimusTiny", **settings)
    assert method.feature_level == ("encoder0" if "level" in settings else "decoder0")
    assert not any("seg_layers" in prefix for prefix in method.pretrained_prefixes)


def test_autocast_leaves_the_known_deformation_and_its_image_exact(cases, monkeypatch):
    """In bfloat16 voxels land up to one from where the target says."""
    method = method_of()
    views = views_of(cases, method.view_policy)
    deformation = drawn_warp(views[0])
    exact = warp(views[0].voxels, deformation)
    seen = []
    encode, pair = method.backbone.forward_features, registration.pair_crops
    monkeypatch.setattr(method.backbone, "forward_features", lambda x: seen.append(x) or encode(x))
    monkeypatch.setattr(registration, "pair_crops", lambda *a: seen.append(a[2]) or pair(*a))
    with torch.autocast("cpu", torch.bfloat16):
        method(views)
        shown = method.pictures(views)
    image, field = seen[:2]
    assert torch.equal(image[: len(exact)], exact) and torch.equal(shown["fixed"], exact)
    assert torch.equal(field, deformation)


def test_a_single_case_teaches_without_others(cases):
    method = method_of()
    step = method(views_of(cases, method.view_policy, batch=1))
    assert not any(name.startswith("cross_") for name in step.terms) and step.terms["error"] > 0
    assert set(method.pictures(views_of(cases, method.view_policy, batch=1))) >= {"fixed", "moving, registered"}


def test_a_weight_of_zero_spares_registering_different_cases(cases, monkeypatch):
    method = method_of(cross=0.0)
    monkeypatch.setattr(method, "_find", lambda *_: pytest.fail("different cases were registered"))
    step = method(views_of(cases, method.view_policy))
    assert not any(name.startswith("cross_") for name in step.terms) and step.terms["error"] > 0


def crops_of(cases, stride=(1, 1, 1), labels=()):
    """Crops whose feature maps are the images themselves."""
    policy = RegistrationPairs((16, 16, 16), intensity=NO_INTENSITY, labels=bool(labels))
    fixed, moving = views_of(cases, policy)
    deformation = drawn_warp(fixed)
    maps = tuple(
        torch.nn.functional.avg_pool3d(volume, stride) for volume in (warp(fixed.voxels, deformation), moving.voxels)
    )
    return pair_crops(fixed, moving, deformation, maps, stride, labels), moving


@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 2, 2)])
def test_targets_lead_from_what_the_fixed_map_shows_to_what_the_moving_map_shows(cases, stride):
    crops, _ = crops_of(cases, stride)
    for pair in crops.same():
        apart, unmoved = (
            (pair.fixed - moved)[:, pair.valid].square().mean()
            for moved in (warp(pair.moving, pair.target), pair.moving)
        )
        assert apart < 0.25 * unmoved
        assert pair.spacing == tuple(map(float, stride))


def test_labels_of_the_fixed_view_are_those_that_were_cut_with_it(cases):
    """Two ways to them: through the known displacement from the moving view, and cut with the fixed view, then deformed."""
    fixed, moving = views_of(cases, RegistrationPairs((16, 16, 16), intensity=NO_INTENSITY, labels=True))
    deformation = drawn_warp(fixed)
    crops = pair_crops(fixed, moving, deformation, (fixed.voxels, moving.voxels), (1, 1, 1), (1,))
    cut = warp((fixed.labels == 1)[:, None].float(), deformation)[:, 0]
    through = crops.labels[0][:, 0]
    agree, both = ((2 * cut * through)[crops.inside].sum(), (cut + through)[crops.inside].sum())
    assert both > 100 and agree / both > 0.8
    unmoved = crops.labels[1][:, 0]
    assert agree / both > (2 * cut * unmoved)[crops.inside].sum() / (cut + unmoved)[crops.inside].sum() + 0.1


def test_two_cases_meet_through_the_field_that_was_found_between_them(cases):
    """With a field that is known, all of the way from the fixed view of one case to the moving view of the other is."""
    crops, moving = crops_of(cases, labels=(1,))
    asked = []

    def find(guides, seen, spacing):
        asked.append([a.shape[0] for a, _ in guides])
        there = torch.zeros(3, 16, 16, 16)
        there[0] = 2
        return there, -there

    forth, back = crops.different(find)[:2]
    assert asked == [[1, 12, 1]] * 2  # two twos, described by features, MIND and one label
    torch.testing.assert_close(forth.target, crops.known[0] + torch.tensor([2.0, 0, 0]).view(3, 1, 1, 1))
    torch.testing.assert_close(back.target, crops.known[1] - torch.tensor([2.0, 0, 0]).view(3, 1, 1, 1))
    # in case voxels, counted from the middle of each case, the end of the way is two planes further
    place = np.argwhere(forth.valid.numpy())[0]
    offset = moving.affine[0, :3, 3] - (moving.case_shape[0] - 1) / 2
    other = moving.affine[1, :3, 3] - (moving.case_shape[1] - 1) / 2
    end = torch.tensor(place) + forth.target[(slice(None), *place)] + (offset - other)  # a voxel of the other's view
    whole = torch.nn.functional.grid_sample(
        crops.moving[1][None], ((2 * end + 1) / 16 - 1).flip(-1).view(1, 1, 1, 1, 3), align_corners=False
    )
    aligned = warp(forth.moving, forth.target)[(slice(None), *place)]
    assert aligned.item() == pytest.approx(whole.item(), abs=0.15)
    assert 0 < forth.valid.float().mean() < 1 and (forth.distinct <= forth.valid).all()


def test_crops_that_show_different_parts_do_not_meet(cases):
    policy = RegistrationPairs((8, 8, 8), intensity=NO_INTENSITY)
    fixed, moving = views_of(cases[-1:] * 2, policy, batch=2)
    moving.affine[1, :3, 3] = moving.affine[0, :3, 3] + 7.6
    crops = pair_crops(fixed, moving, drawn_warp(fixed), (fixed.voxels, moving.voxels), (1, 1, 1))
    assert crops.different(lambda *_: pytest.fail("registered")) == []


def test_settings_that_make_no_sense_are_named():
    with pytest.raises(NnsslError, match="guide"):
        RegistrationSettings(guide=1.5)
    with pytest.raises(NnsslError, match="background"):
        RegistrationSettings(labels=(0, 1))
