"""Halves, layer-wise decay and weight decay of real networks."""

from typing import cast

import pytest
import torch
from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
from network_plans import swin_plans
from torch import nn

from nnssl_ext.contracts import Backbone
from nnssl_ext.errors import NnsslError
from nnssl_ext.networks.build import build_backbone
from nnssl_ext.networks.layers import layer_decay_rules
from nnssl_ext.networks.primus import SegmentationPrimus
from nnssl_ext.networks.primus_backbone import PrimusBackbone
from nnssl_ext.networks.resenc_backbone import ResEncBackbone
from nnssl_ext.trainers.finetuning.groups import IterationSchedule, half_of, parameter_groups
from nnssl_ext.trainers.finetuning.settings import FinetuneSettings


def primus() -> SegmentationPrimus:
    ones, twos = [1, 1, 1], [2, 2, 2]
    return SegmentationPrimus(
        1, 3, embed_dim=24, eva_depth=2, eva_numheads=2, input_shape=[16, 16, 16], strides=[ones, twos, twos],
        num_register_tokens=2, class_token=True,
    )  # fmt: skip


def resenc() -> ResidualEncoderUNet:
    return ResidualEncoderUNet(
        1, 2, [4, 8], nn.Conv3d, 3, [1, 2], [1, 1], 3, [1], conv_bias=True, norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"affine": True}, nonlin=nn.LeakyReLU, deep_supervision=True,
    )  # fmt: skip


def by_name(network: nn.Module, groups: list[dict]) -> dict[str, dict]:
    names = {id(p): name for name, p in network.named_parameters()}
    return {names[id(p)]: group for group in groups for p in group["params"]}


@pytest.mark.parametrize("build", [primus, resenc])
def test_every_parameter_is_in_exactly_one_group(build) -> None:
    network = build()
    grouped = [id(p) for group in parameter_groups(network, FinetuneSettings()) for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in network.parameters()}


def swin() -> Backbone:
    pytest.importorskip("monai", reason="Swin UNETR needs MONAI (extra: swin)")
    return build_backbone(swin_plans(), "3d_fullres", 1)


@pytest.mark.parametrize(
    "build",
    [lambda: PrimusBackbone(primus()), lambda: ResEncBackbone(resenc()), swin],
    ids=["primus", "resenc", "swin"],
)
def test_halves_are_those_the_backbones_declare(build) -> None:
    backbone = build()
    for name in backbone.network.state_dict():  # aliases such as decoder.encoder.* included
        if ".seg_layers." in name:
            assert half_of(name) == "head"
        else:
            assert (half_of(name) == "encoder") == name.startswith(backbone.encoder_prefixes)
            assert half_of(name) == "encoder" or name.startswith(backbone.decoder_prefixes)


def test_layer_decay_by_hand() -> None:
    """Depth 2 and decay 1/2: stem, tokens and positions 1/8, block 0 1/4, block 1 1/2, final norm and decoder 1."""
    network = primus()
    found = by_name(network, parameter_groups(network, FinetuneSettings(layer_decay=0.5)))
    expected = {
        "down_projection.proj.weight": 1 / 8,
        "class_token": 1 / 8,
        "register_tokens": 1 / 8,
        "eva.pos_embed": 1 / 8,
        "eva.blocks.0.norm1.weight": 1 / 4,
        "eva.blocks.1.norm1.weight": 1 / 2,
        "eva.norm.weight": 1.0,
        "decoder.stages.0.0.weight": 1.0,
        "decoder.seg_layers.1.weight": 1.0,
    }
    assert {name: found[name]["layer_scale"] for name in expected} == expected


def test_layers_are_those_of_pretraining() -> None:
    network = primus()
    found = by_name(network, parameter_groups(network, FinetuneSettings(layer_decay=0.5)))
    rules = layer_decay_rules(cast(Backbone, PrimusBackbone(network)), "", decay=0.5, stem_scale=1.0)
    for name, group in found.items():
        scales = [rule.lr_scale for rule in rules if f"network.{name}".startswith(rule.prefix)]
        assert [group["layer_scale"]] == (scales or [1.0]), name


def test_only_kernels_and_matrices_are_decayed() -> None:
    network = primus()
    found = by_name(network, parameter_groups(network, FinetuneSettings(weight_decay=0.05)))
    decayed = {name for name, group in found.items() if group["weight_decay"] == 0.05}
    assert {"down_projection.proj.weight", "decoder.stages.0.0.weight", "decoder.seg_layers.0.weight"} <= decayed
    assert not decayed & {"eva.pos_embed", "class_token", "register_tokens", "eva.norm.weight"}
    assert not [name for name in decayed if name.endswith("bias")]
    assert {group["weight_decay"] for group in found.values()} == {0.0, 0.05}


def test_layer_decay_without_blocks_is_refused() -> None:
    with pytest.raises(NnsslError, match=r"layer_decay 0\.75"):
        parameter_groups(resenc(), FinetuneSettings(layer_decay=0.75))


def test_rates_reach_the_groups_with_layer_decay_only_once_pretrained() -> None:
    network = primus()
    settings = FinetuneSettings(
        epochs=1,
        iterations_per_epoch=10,
        warmup_share=0.0,
        layer_decay=0.5,
        lr_encoder=8.0,
        lr_decoder=1.0,
        lr_scratch=3.0,
    )
    optimizer = torch.optim.AdamW(parameter_groups(network, settings), lr=0.0)
    schedule = IterationSchedule(optimizer, settings)
    found = by_name(network, optimizer.param_groups)
    schedule.step(0)
    assert {group["lr"] for group in found.values()} == {3.0}
    schedule.pretrained = True
    schedule.at(0)
    names = ("eva.pos_embed", "eva.blocks.1.norm1.weight", "eva.norm.weight", "decoder.seg_layers.0.weight")
    assert [found[name]["lr"] for name in names] == [1.0, 4.0, 8.0, 1.0]
    assert not any(group["frozen"] for group in found.values())


def test_epochs_are_counted_in_iterations() -> None:
    """Epoch 1 of 4 begins with iteration 10 of 40."""
    settings = FinetuneSettings(epochs=4, iterations_per_epoch=10, warmup_share=0.0, lr_scratch=3.0)
    optimizer = torch.optim.SGD(parameter_groups(resenc(), settings), lr=0.0)
    IterationSchedule(optimizer, settings).step(1)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == pytest.approx([3 * 0.75**0.9] * len(rates))
