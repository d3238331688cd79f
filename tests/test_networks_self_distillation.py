"""Head, EMA teacher, layer-wise rates and stochastic depth. Rows are those of the table of usual errors in DINOv2 ports."""

import copy
import math

import pytest
import torch
from tiny_dataset import BACKBONES, plans_of
from torch import nn

from nnssl_ext.contracts import Progress
from nnssl_ext.errors import NnsslError
from nnssl_ext.networks.build import build_backbone
from nnssl_ext.networks.dino_head import DINOHead, HeadSettings
from nnssl_ext.networks.layers import layer_decay_rules, set_stochastic_depth
from nnssl_ext.networks.student_teacher import TeacherSettings, dense_level
from nnssl_ext.networks.teacher import EMATeacher, weight_distance

SMALL = HeadSettings(prototypes=40, hidden=32, bottleneck=16)


def backbone_of(preset: str, **changes):
    torch.manual_seed(0)
    plans = plans_of(preset)
    plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"] |= changes
    return build_backbone(plans, "3d_fullres", 1)


def test_row_14_logits_are_cosines_times_a_trainable_gain_of_one():
    head = DINOHead(24, SMALL)
    x = torch.randn(5, 24)
    vectors = nn.functional.normalize(head.mlp(nn.functional.layer_norm(x, (24,))), dim=-1)
    prototypes = nn.functional.normalize(head.last_layer.parametrizations.weight.original1, dim=-1)
    torch.testing.assert_close(head(x), vectors @ prototypes.T)
    gain = head.last_layer.parametrizations.weight.original0
    assert gain.requires_grad and gain.shape == (40, 1)
    head(x).square().sum().backward()
    assert float(gain.grad.norm()) > 0
    with torch.no_grad():
        before = head(x)
        gain[3] *= 2
    torch.testing.assert_close(head(x)[:, 3], 2 * before[:, 3])


def test_row_14_layers_start_with_std_002_without_bias_or_batch_norm():
    torch.manual_seed(0)
    head = DINOHead(512, HeadSettings(prototypes=8, hidden=512, bottleneck=512))
    for layer in head.mlp[::2]:
        assert float(layer.weight.std()) == pytest.approx(0.02, rel=0.02)
        assert float(layer.bias.abs().sum()) == 0
    assert [type(layer).__name__ for layer in head.mlp] == ["Linear", "GELU", "Linear", "GELU", "Linear"]


def test_short_features_are_not_drowned_by_biases():
    """Pooled features are short, and Adam moves every bias by the learning rate: after 3 steps at 1e-3, crops must differ as
    they did. Without the normalisation at the entry a tenth of the difference is left."""
    torch.manual_seed(0)
    head, x = DINOHead(48, HeadSettings(prototypes=64, hidden=512, bottleneck=64)), 0.05 * torch.randn(32, 48)
    before = head(x).std(dim=0).mean()
    with torch.no_grad():
        for layer in head.mlp[::2]:
            layer.bias += 0.003 * torch.randn_like(layer.bias).sign()
        assert head(x).std(dim=0).mean() > 0.9 * before
        head.norm = nn.Identity()
        assert head(x).std(dim=0).mean() < 0.2 * before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_row_14_a_zero_vector_stays_finite_in_half_precision(dtype):
    """torch's own floor of 1e-12 is 0 in float16, and 0 / 0 is NaN."""
    head = DINOHead(8, SMALL)  # with biases of 0 the bottleneck is 0 too
    with torch.autocast("cpu", dtype):
        logits = head(torch.zeros(3, 8))
    assert torch.equal(logits, torch.zeros(3, 40, dtype=dtype))
    whole = head.to(dtype)(torch.zeros(3, 8, dtype=dtype))
    assert torch.equal(whole, torch.zeros(3, 40, dtype=dtype))
    assert bool(nn.functional.normalize(torch.zeros(8, dtype=torch.float16), dim=0).isnan().all())


def test_row_14_gradients_of_a_zero_vector_stay_finite_in_bfloat16():
    head, x = DINOHead(8, SMALL), torch.zeros(3, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        head(x).float().sum().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in [x, *head.parameters()])


def test_a_head_can_be_copied_and_the_copy_is_its_own():
    head = DINOHead(8, SMALL)
    twin = copy.deepcopy(head)
    x = torch.randn(2, 8)
    torch.testing.assert_close(twin(x), head(x))
    with torch.no_grad():
        head.last_layer.parametrizations.weight.original1.mul_(torch.rand(40, 16))
    assert not torch.allclose(twin(x), head(x))


def student_of(*sizes: int) -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"backbone": nn.Sequential(nn.Linear(*sizes), nn.Dropout(0.5), nn.BatchNorm1d(sizes[1]))})


def test_rows_1_and_2_a_teacher_starts_equal_shares_nothing_and_never_trains():
    student = student_of(4, 3)
    teacher = EMATeacher(student)
    pairs = list(zip(teacher.parameters(), student.parameters(), strict=True))
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)
    mine = {t.untyped_storage().data_ptr() for t in [*teacher.parameters(), *teacher.buffers()]}
    theirs = {t.untyped_storage().data_ptr() for t in [*student.parameters(), *student.buffers()]}
    assert mine.isdisjoint(theirs)
    outer = nn.ModuleDict({"student": student, "teacher": teacher})
    outer.train()
    assert student.training and not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_the_teacher_is_a_geometric_mean_of_past_students():
    student = student_of(4, 3)
    student["backbone"][0].bias.requires_grad_(False)
    teacher = EMATeacher(student)
    weight, bias = student["backbone"][0].weight, student["backbone"][0].bias
    expected, first_bias = weight.detach().clone(), bias.clone()
    for momentum in (0.9, 0.5, 1.0, 0.0):
        with torch.no_grad():
            weight += torch.randn_like(weight)
            bias += 1
            student["backbone"][2].running_mean += 1
        teacher.move(student, momentum)
        expected = momentum * expected + (1 - momentum) * weight.detach()
        torch.testing.assert_close(teacher.parts["backbone"][0].weight, expected)
    assert torch.equal(
        teacher.parts["backbone"][0].bias, first_bias
    )  # what the student does not train, it cannot teach
    torch.testing.assert_close(teacher.parts["backbone"][2].running_mean, torch.full((3,), 4.0))


def test_weight_distance_by_hand():
    student, teacher = nn.Linear(2, 1), nn.Linear(2, 1)
    with torch.no_grad():
        for layer, weight, bias in ((student, [3.0, 0.0], 4.0), (teacher, [3.0, 3.0], 0.0)):
            layer.weight.copy_(torch.tensor([weight]))
            layer.bias.fill_(bias)
    assert float(weight_distance(teacher, student)) == pytest.approx(1.0)  # |(0, 3, -4)| / |(3, 0, 4)|
    assert float(weight_distance(student, student)) == 0


def test_rows_3_and_16_schedules_move_with_every_step():
    settings = TeacherSettings(momentum=(0.992, 1.0), temperature=(0.04, 0.07), temperature_warmup=0.3)
    momenta = [settings.momentum_at(Progress(step, 100)) for step in range(101)]
    assert (
        momenta[0] == pytest.approx(0.992) and momenta[50] == pytest.approx(0.996) and momenta[100] == pytest.approx(1)
    )
    assert momenta[25] == pytest.approx(1 - 0.008 * (1 + math.cos(math.pi / 4)) / 2)
    temperatures = [settings.temperature_at(Progress(step, 100)) for step in range(100)]
    assert temperatures[:31] == pytest.approx([0.04 + 0.001 * step for step in range(31)])
    assert temperatures[30:] == pytest.approx([0.07] * 70)
    steps = TeacherSettings(temperature=(0.04, 0.07), temperature_warmup=10.0)
    assert steps.temperature_at(Progress(5, 1000)) == pytest.approx(0.055)
    assert TeacherSettings(temperature_warmup=0.0).temperature_at(Progress(0, 10)) == 0.07


def scales_of(backbone, **arguments) -> dict[str, float]:
    """Learning-rate factor of every encoder parameter by the rules."""
    rules = layer_decay_rules(backbone, "student.", **arguments)
    found = {}
    for name, _ in backbone.named_parameters():
        matching = [rule.lr_scale for rule in rules if f"student.{name}".startswith(rule.prefix)]
        assert len(matching) <= 1, name
        found[name] = matching[0] if matching else 1.0
    return found


def test_row_18_the_stem_learns_at_02_of_the_first_layer_and_layers_fall_by_09():
    """PrimusM's 16 layers: the stem at 0.2 * 0.9 ** 17 = 0.033."""
    found = scales_of(
        backbone_of("PrimusTiny", eva_depth=16, class_token=True, num_register_tokens=2), decay=0.9, stem_scale=0.2
    )
    for name, scale in found.items():
        part = name.removeprefix("network.")
        if part.startswith("down_projection."):
            expected = 0.2 * 0.9**17
        elif part in ("mask_token", "class_token", "register_tokens", "eva.pos_embed"):
            expected = 0.9**17
        elif part.startswith("eva.blocks."):
            expected = 0.9 ** (16 - int(part.split(".")[2]))
        else:
            assert part.startswith(("eva.norm.", "decoder."))
            expected = 1.0
        assert scale == pytest.approx(expected), name
    assert found["network.eva.blocks.1.norm1.weight"] != found["network.eva.blocks.10.norm1.weight"]


def test_row_18_stages_of_a_convolutional_encoder_are_its_layers():
    found = scales_of(backbone_of("ResEncTiny"), decay=0.5, stem_scale=0.2)
    for name, scale in found.items():
        part = name.removeprefix("network.")
        if part.startswith("encoder.stem."):
            expected = 0.2 * 0.5**4
        elif part.startswith("encoder.stages."):
            expected = 0.5 ** (3 - int(part.split(".")[2]))
        else:
            expected = 1.0
        assert scale == pytest.approx(expected), name


@pytest.mark.parametrize("preset", BACKBONES)
def test_no_decay_needs_no_rule(preset):
    assert layer_decay_rules(backbone_of(preset), "", 1.0, 1.0) == ()


def test_row_22_stochastic_depth_is_the_same_in_every_block_and_off_in_the_teacher():
    backbone = backbone_of("PrimusTiny", eva_depth=4, drop_path_rate=0.2)
    rates = lambda: [getattr(block.drop_path1, "drop_prob", 0.0) for block in backbone.network.eva.blocks]
    assert rates() == pytest.approx([0, 0.2 / 3, 0.4 / 3, 0.2])  # the plans' network: rising
    set_stochastic_depth(backbone, 0.3)
    assert rates() == [0.3] * 4
    teacher = EMATeacher(nn.ModuleDict({"backbone": backbone})).train()
    x = torch.randn(2, 1, 16, 16, 16)
    first, second = (teacher.parts["backbone"].forward_features(x).summary for _ in range(2))
    assert torch.equal(first, second)
    backbone.train()
    first, second = (backbone.forward_features(x).summary for _ in range(2))
    assert not torch.equal(first, second)


def test_places_are_those_of_the_coarsest_map_of_at_most_8_voxels_each():
    assert dense_level(backbone_of("ResEncTiny")) == 2  # strides 1, 2, 4
    assert dense_level(backbone_of("ResEncTiny", strides=[[1, 1, 1], [2, 2, 2], [8, 8, 8]])) == 1  # 1, 2, 16


def test_stochastic_depth_is_refused_without_blocks():
    with pytest.raises(NnsslError, match="no transformer blocks"):
        set_stochastic_depth(backbone_of("ResEncTiny"), 0.3)
