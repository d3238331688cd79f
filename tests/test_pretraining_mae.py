import numpy as np
import pytest
import torch
from tiny_dataset import BACKBONES, CROP, plans_of

from nnssl_ext.errors import NnsslError
from nnssl_ext.networks.build import build_backbone
from nnssl_ext.plans import pretrain_plan
from nnssl_ext.records import Case, View
from nnssl_ext.trainers.pretraining.mae import MAESettings, MAETrainer, default_block


def method_of(backbone: str, **settings) -> MAETrainer:
    torch.manual_seed(0)
    plans = plans_of(backbone)
    if backbone.startswith("Primus"):
        plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"] |= {"drop_path_rate": 0.0}
    plan = pretrain_plan(plans, "3d_fullres", 1)
    return MAETrainer(MAESettings(**settings), build_backbone(plans, "3d_fullres", 1), plan)


def view_of(method: MAETrainer, tmp_path, batch: int = 2, case_shape=(40, 40, 40), lower=(0, 0, 0)) -> View:
    rng = np.random.default_rng(0)
    case = Case("case", tmp_path, 1, CROP, (1.0, 1.0, 1.0))
    masks = [method.view_policy.draw(case, rng, 0.5)[0].mask for _ in range(batch)]
    affine = torch.eye(4).repeat(batch, 1, 1)
    affine[:, :3, 3] = torch.tensor(lower, dtype=torch.float32)
    return View(
        voxels=torch.randn(batch, 1, *CROP, generator=torch.Generator().manual_seed(1)),
        affine=affine,
        case_shape=torch.tensor([case_shape] * batch),
        spacing=torch.ones(batch, 3),
        cases=("case",) * batch,
        mask=torch.from_numpy(np.stack(masks)),
    )


def hidden_voxels(view: View) -> torch.Tensor:
    cells = view.mask[:, None].float()
    return torch.nn.functional.interpolate(cells, view.voxels.shape[2:], mode="nearest") > 0


ALL = [(backbone, "mae") for backbone in BACKBONES] + [("PrimusTiny", "simmim")]


@pytest.mark.parametrize(("backbone", "variant"), ALL)
def test_hidden_voxels_do_not_reach_the_prediction(backbone, variant, tmp_path):
    method = method_of(backbone, variant=variant).eval()
    view = view_of(method, tmp_path)
    hidden = hidden_voxels(view)
    assert hidden.float().mean() == pytest.approx(0.75)
    other = torch.where(hidden, torch.randn_like(view.voxels) * 100, view.voxels)
    seen = torch.where(hidden, view.voxels, view.voxels + 1)
    with torch.no_grad():
        before, _ = method.reconstruct(view.voxels, view.mask)
        changed_hidden, _ = method.reconstruct(other, view.mask)
        changed_seen, _ = method.reconstruct(seen, view.mask)
    torch.testing.assert_close(before, changed_hidden, rtol=0, atol=1e-6)
    assert not torch.allclose(before, changed_seen)


@pytest.mark.parametrize(("backbone", "variant"), ALL)
@pytest.mark.parametrize("normalise", [False, True])
def test_only_hidden_voxels_inside_the_case_are_scored(backbone, variant, normalise, tmp_path, monkeypatch):
    method = method_of(backbone, variant=variant, normalise_targets=normalise)
    # the crop begins 4 voxels above the case along z and ends 6 voxels beyond it along x
    view = view_of(method, tmp_path, case_shape=(40, 40, 10), lower=(-4, 0, 0))
    inside = torch.zeros(CROP, dtype=torch.bool)
    inside[4:, :, :10] = True
    counts = hidden_voxels(view) & inside
    prediction = torch.randn(2, 1, *CROP, requires_grad=True)
    monkeypatch.setattr(method.reconstruct, "forward", lambda voxels, mask: (prediction, torch.zeros(2, 1)))
    method((view,)).loss.backward()
    assert torch.equal(prediction.grad != 0, counts)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("normalise", [False, True])
def test_the_true_voxels_as_prediction_score_zero(backbone, normalise, tmp_path, monkeypatch):
    method = method_of(backbone, normalise_targets=normalise)
    view = view_of(method, tmp_path)
    truth, _, _ = method._target(view)
    monkeypatch.setattr(method.reconstruct, "forward", lambda voxels, mask: (truth, torch.zeros(2, 1)))
    step = method((view,))
    assert float(step.loss) == 0
    assert float(step.terms["zero_predictor"]) > 0.5


@pytest.mark.parametrize(("backbone", "variant"), ALL)
def test_the_loss_is_the_mean_power_of_errors_at_hidden_voxels(backbone, variant, tmp_path):
    """Squares for MAE, absolute values for SimMIM."""
    method = method_of(backbone, variant=variant, normalise_targets=False).eval()
    view = view_of(method, tmp_path)
    prediction, _ = method.reconstruct(view.voxels, view.mask)
    errors = (prediction - view.voxels)[hidden_voxels(view)]
    expected = errors.abs().mean() if variant == "simmim" else errors.square().mean()
    torch.testing.assert_close(method((view,)).loss, expected)


def test_zero_prediction_of_normalised_tokens_scores_n_minus_1_over_n(tmp_path):
    method = method_of("PrimusTiny", normalise_targets=True)
    step = method((view_of(method, tmp_path),))
    assert float(step.terms["zero_predictor"]) == pytest.approx(63 / 64, rel=1e-4)  # tokens of 4 x 4 x 4 voxels


def test_predicted_tokens_land_where_their_voxels_are(tmp_path):
    # a decoder that answers with the number of its token must paint the token grid in C order
    method = method_of("PrimusTiny")
    decoder = method.reconstruct.decoder
    view = view_of(method, tmp_path)
    numbers = torch.arange(64.0)[None, :, None].expand(2, 64, 64)
    decoder.forward = lambda visible, ids, grid: numbers
    painted, _ = method.reconstruct(view.voxels, view.mask)
    for flat, (z, y, x) in enumerate(np.ndindex(4, 4, 4)):
        block = painted[:, 0, 4 * z : 4 * z + 4, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4]
        assert (block == flat).all()


@pytest.mark.parametrize(("backbone", "variant"), ALL)
def test_one_crop_can_be_learnt_by_heart(backbone, variant, tmp_path):
    method = method_of(backbone, variant=variant)
    view = view_of(method, tmp_path, batch=1)
    grid = torch.stack(torch.meshgrid(*[torch.linspace(0, 3, n) for n in CROP], indexing="ij"))
    view = View(
        voxels=torch.sin(grid.sum(0))[None, None] * 2,
        affine=view.affine,
        case_shape=view.case_shape,
        spacing=view.spacing,
        cases=view.cases,
        mask=view.mask,
    )
    optimizer = torch.optim.Adam(method.parameters(), lr=5e-3)
    losses = []
    for _ in range(400):
        optimizer.zero_grad()
        loss = method((view,)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]


def test_the_trained_parts_are_the_ones_that_get_a_gradient(tmp_path):
    for backbone in BACKBONES:
        method = method_of(backbone)
        method((view_of(method, tmp_path),)).loss.backward()
        network = method.export_backbone().network
        for name, parameter in network.named_parameters():
            trained = name.startswith(method.pretrained_prefixes)
            assert trained == (parameter.grad is not None), name


def test_pictures_keep_what_was_seen(tmp_path):
    for normalise in (False, True):
        method = method_of("ResEncTiny", normalise_targets=normalise)
        view = view_of(method, tmp_path)
        shown = method.pictures((view,))
        hidden = hidden_voxels(view)
        assert torch.equal(shown["reconstruction"][~hidden], view.voxels[~hidden])
        assert not torch.equal(shown["reconstruction"][hidden], view.voxels[hidden])
        assert (shown["seen"][hidden] == 0).all()


def test_default_block_fits_small_and_anisotropic_crops():
    assert default_block((160, 160, 160)) == (16, 16, 16)  # nnssl
    assert default_block((40, 56, 40)) == (8, 8, 8)
    assert default_block((16, 320, 320)) == (4, 16, 16)
    assert default_block((36, 52, 7)) == (8, 8, 1)


def test_what_cannot_work_is_refused_by_name():
    with pytest.raises(NnsslError, match="SimMIM needs tokens"):
        method_of("ResEncTiny", variant="simmim")
    with pytest.raises(NnsslError, match=r"mask_ratio 1\.2"):
        MAESettings(mask_ratio=1.2)
