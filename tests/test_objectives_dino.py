"""The DINO, iBOT and KoLeo losses against hand values, brute force and an independent library."""

import math

import pytest
import torch

from nnssl_ext.errors import NnsslError
from nnssl_ext.objectives.dino import dino_loss, entropy, teacher_figures
from nnssl_ext.objectives.ibot import hidden_tokens, ibot_loss
from nnssl_ext.objectives.koleo import koleo_loss


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cross_entropy(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    return -(teacher * (student / temperature).log_softmax(-1)).sum(-1)


@pytest.mark.parametrize(("globals_", "locals_", "pairs"), [(2, 8, 18), (2, 0, 2), (1, 3, 3), (3, 2, 12)])
def test_every_teacher_crop_meets_every_other_student_crop(globals_, locals_, pairs):
    """Row 9 of dino.md: locals x all teachers, globals across only, one division by the number of pairs."""
    student, teacher = random(globals_ + locals_, 4, 6), random(globals_, 4, 6, seed=1).softmax(-1)
    terms = [
        cross_entropy(student[v, b], teacher[g, b], 0.1)
        for g in range(globals_)
        for v in range(globals_ + locals_)
        for b in range(4)
        if v != g
    ]
    assert len(terms) == 4 * pairs
    torch.testing.assert_close(dino_loss(student, teacher, 0.1), torch.stack(terms).mean())


def test_dino_by_hand():
    """Two global crops, one case. The teacher is sure of prototype 0, then of 1; the student's logits are 0.1 ln 3 and 0."""
    student = 0.1 * torch.tensor([[[math.log(3.0), 0.0]], [[0.0, 0.0]]])
    teacher = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    # teacher 0 meets student 1, uniform: ln 2; teacher 1 meets student 0, which gives prototype 1 a quarter: ln 4
    assert float(dino_loss(student, teacher, 0.1)) == pytest.approx((math.log(2) + math.log(4)) / 2)


@pytest.mark.parametrize("prototypes", [4096, 65536])
def test_a_uniform_output_costs_ln_k(prototypes):
    student, teacher = torch.zeros(10, 1, prototypes), torch.full((2, 1, prototypes), 1 / prototypes)
    loss = dino_loss(student, teacher, 0.1)
    assert float(loss) == pytest.approx(math.log(prototypes), rel=1e-5)  # 8.318 and 11.090
    figures = teacher_figures(loss, teacher, teacher[0])
    assert float(figures["dino_of_ln_k"]) == pytest.approx(1, rel=1e-5)
    assert float(figures["teacher_entropy"]) == pytest.approx(1, rel=1e-5)
    assert float(figures["patch_entropy"]) == pytest.approx(1, rel=1e-5)
    assert float(figures["kl"]) == pytest.approx(0, abs=1e-4)


def test_kl_is_the_loss_of_a_student_over_that_of_a_perfect_one():
    teacher = random(2, 3, 6, seed=1).softmax(-1)
    student = 0.1 * teacher.roll(1, dims=0).log()  # says what the teacher says about the other crop
    perfect = dino_loss(student, teacher, 0.1)
    torch.testing.assert_close(perfect, entropy(teacher))
    other = dino_loss(random(2, 3, 6), teacher, 0.1)
    divergence = torch.distributions.kl_divergence(
        torch.distributions.Categorical(teacher),
        torch.distributions.Categorical(logits=random(2, 3, 6).roll(1, 0) / 0.1),
    )
    torch.testing.assert_close(teacher_figures(other, teacher, None)["kl"], divergence.mean(), rtol=1e-4, atol=1e-5)


def test_dino_equals_an_independent_library():
    oracle = pytest.importorskip("lightly.loss.dino_loss").DINOLoss(
        output_dim=16, warmup_teacher_temp=0.04, teacher_temp=0.04, warmup_teacher_temp_epochs=1, student_temp=0.1
    )
    student, teacher = random(10, 5, 16), random(2, 5, 16, seed=1)
    expected = oracle(list(teacher), list(student), epoch=0)
    torch.testing.assert_close(dino_loss(student, (teacher / 0.04).softmax(-1), 0.1), expected)


@pytest.mark.parametrize("grid", [(1, 4, 6), (3, 4, 2)])  # a flat grid is a 2D one
def test_ibot_is_the_mean_over_hidden_tokens_and_then_over_all_crops(grid):
    """Row 12 of dino.md: 1 / hidden tokens of the crop, divided by all crops, also by those without a mask."""
    mask = torch.zeros(4, *grid, dtype=torch.bool)
    mask[0, 0, 1:3, 0] = True
    mask[2, 0, :, 1] = True
    mask[2, -1, 0, :] = True
    places = grid[0] * grid[1] * grid[2]
    student, teacher = random(4, places, 7), random(4, places, 7, seed=1).softmax(-1)
    brute = []
    for crop in range(4):
        errors = [
            cross_entropy(student[crop, place], teacher[crop, place], 0.1)
            for place in range(places)
            if mask[crop].flatten()[place]
        ]
        brute.append(torch.stack(errors).mean() if errors else torch.zeros(()))
    ids, weights = hidden_tokens(mask)
    assert len(ids) == int(mask.sum())
    rows = (logits.flatten(0, 1)[ids] for logits in (student, teacher))
    torch.testing.assert_close(ibot_loss(*rows, weights, 4, 0.1), torch.stack(brute).mean())


def test_half_of_the_crops_masked_weigh_half():
    mask = torch.zeros(64, 6, 6, 6, dtype=torch.bool)
    mask[::2] = torch.rand(32, 6, 6, 6, generator=torch.Generator().manual_seed(0)) < 0.4
    _, weights = hidden_tokens(mask)
    assert float(weights.sum() / 64) == pytest.approx(0.5)


def test_ibot_equals_an_independent_library():
    oracle = pytest.importorskip("lightly.loss.ibot_loss").IBOTPatchLoss(
        output_dim=9, teacher_temp=0.04, student_temp=0.1
    )
    mask = torch.rand(6, 2, 3, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    ids, weights = hidden_tokens(mask)
    student, teacher = random(len(ids), 9), random(len(ids), 9, seed=1)
    expected = oracle(teacher, student, mask.view(6, 6, 4))  # it wants (B, H, W); one axis there may be anything
    torch.testing.assert_close(ibot_loss(student, (teacher / 0.04).softmax(-1), weights, 6, 0.1), expected)


def test_without_hidden_tokens_ibot_is_zero_and_still_reaches_its_inputs():
    """A process whose crops happen to have no mask must still take part in data-parallel gradients."""
    student = torch.empty(0, 5, requires_grad=True)
    loss = ibot_loss(student * 2, torch.empty(0, 5), torch.empty(0), 4, 0.1)
    loss.backward()
    assert float(loss.detach()) == 0
    assert student.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_are_computed_in_float32(dtype):
    """Row 25 of dino.md."""
    student, teacher = random(4, 3, 4096).to(dtype), random(2, 3, 4096, seed=1).softmax(-1)
    weights = torch.full((3,), 1 / 3)
    expected = dino_loss(student.float(), teacher, 0.1), ibot_loss(student[0].float(), teacher[0], weights, 1, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        found = dino_loss(student, teacher, 0.1), ibot_loss(student[0], teacher[0], weights, 1, 0.1)
    assert {loss.dtype for loss in found} == {torch.float32}
    torch.testing.assert_close(found, expected)


def test_koleo_by_hand():
    """On the circle at 0, 90 and 210 degrees: nearest neighbours 1, 0 (chord sqrt 2) and 1 (120 degrees, chord sqrt 3)."""
    angles = torch.deg2rad(torch.tensor([0.0, 90.0, 210.0]))
    points = torch.stack([angles.cos(), angles.sin()], dim=1) * torch.tensor(
        [[1.0], [5.0], [0.1]]
    )  # lengths do not matter
    expected = -(math.log(math.sqrt(2)) * 2 + math.log(math.sqrt(3))) / 3
    assert float(koleo_loss(points[None])) == pytest.approx(expected, rel=1e-5)


def test_koleo_never_mixes_views_and_sums_them():
    """Row 10 of dino.md. The views are equal, so across them every distance would be 0."""
    features = random(6, 8)
    single = koleo_loss(features[None])
    torch.testing.assert_close(koleo_loss(torch.stack([features, features])), 2 * single)


def test_koleo_equals_an_independent_library():
    oracle = pytest.importorskip("lightly.loss.koleo_loss").KoLeoLoss()
    features = random(2, 7, 5)
    torch.testing.assert_close(koleo_loss(features), oracle(features[0]) + oracle(features[1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_duplicates_stay_finite_in_koleo(dtype):
    features = random(1, 5, 8).to(dtype)
    features[:, 1] = features[:, 0]
    features[:, 2] = 0
    features.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = koleo_loss(features)
    loss.backward()
    assert loss.dtype == torch.float32
    assert bool(torch.isfinite(loss)) and bool(torch.isfinite(features.grad).all())


def test_koleo_refuses_a_batch_of_one():
    with pytest.raises(NnsslError, match="this batch has one") as refused:
        koleo_loss(random(2, 1, 8))
    assert "koleo_weight" in refused.value.fix
