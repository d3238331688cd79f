"""The memory model against what torch really holds: every parameter, every value saved for the backward pass."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
from test_planners_plans import write_dataset
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nnssl_ext.networks.primus import SegmentationPrimus
from nnssl_ext.networks.swin_unetr import SegmentationSwinUNETR
from nnssl_ext.planners.memory import Cost, Views, largest_batch, memory_gb, network_cost
from nnssl_ext.planners.primus import nnsslPlannerPrimusB
from nnssl_ext.planners.sizes import token_strides
from nnssl_ext.planners.swin import nnsslPlannerSwinUNETR
from nnssl_ext.plans import configuration_of

TOLERANCE = 0.005  # of the saved values; parameters are exact


def saved_bytes(network: nn.Module, x: torch.Tensor, bf16: bool = False) -> int:
    """Bytes of the distinct storages that one forward pass keeps for its backward pass, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # keeping it alive keeps its address unique
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        network(x)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def primus(**changes: Any) -> dict[str, Any]:
    arch = {
        "embed_dim": 96,
        "eva_depth": 3,
        "eva_numheads": 2,
        "input_shape": (16, 24, 16),
        "strides": token_strides((4, 4, 4)),
        "decoder_widths": [40, 16],
        "num_register_tokens": 0,
        "class_token": False,
        "drop_path_rate": 0.0,
        "init_values": 0.1,
        "scale_attn_inner": True,
    } | changes
    return {"network_class_name": "nnssl_ext.networks.primus.SegmentationPrimus", "arch_kwargs": arch}


def resenc(**changes: Any) -> dict[str, Any]:
    arch = {
        "n_stages": 3,
        "features_per_stage": [16, 32, 64],
        "kernel_sizes": [[3, 3, 3]] * 3,
        "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]],
        "n_blocks_per_stage": [1, 2, 2],
        "n_conv_per_stage_decoder": [1, 1],
        "conv_op": nn.Conv3d,
        "conv_bias": True,
        "norm_op": nn.InstanceNorm3d,
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": nn.LeakyReLU,
        "nonlin_kwargs": {"inplace": True},
    } | changes
    return {"network_class_name": "architectures.unet.ResidualEncoderUNet", "arch_kwargs": arch}


def swin(**changes: Any) -> dict[str, Any]:
    arch = {
        "feature_size": 12,
        "depths": [2, 1, 2, 1],
        "num_heads": [1, 2, 4, 8],
        "window_size": 5,
        "drop_path_rate": 0.0,
    } | changes
    return {"network_class_name": "nnssl_ext.networks.swin_unetr.SegmentationSwinUNETR", "arch_kwargs": arch}


ANISOTROPIC = {
    "n_stages": 4,
    "features_per_stage": [16, 32, 64, 64],
    "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3], [3, 3, 3]],
    "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2]],
    "n_blocks_per_stage": [1, 3, 2, 2],
    "n_conv_per_stage_decoder": [1, 2, 1],
}
CASES = [
    (primus(), (16, 24, 16), 1),
    (primus(scale_attn_inner=False), (16, 24, 16), 2),
    (primus(init_values=None), (16, 24, 16), 1),
    (primus(num_register_tokens=4, class_token=True), (16, 24, 16), 1),
    (primus(strides=token_strides((2, 8, 8)), decoder_widths=[64, 32, 16], input_shape=(8, 32, 32)), (8, 32, 32), 1),
    (primus(), (32, 24, 16), 1),  # not the size that positions were laid out for
    (resenc(), (16, 24, 16), 1),
    (resenc(**ANISOTROPIC), (8, 32, 32), 2),
]


@pytest.mark.parametrize(("architecture", "size", "channels"), CASES)
def test_parameters_and_saved_values_match_torch(architecture, size, channels):
    cls = SegmentationPrimus if "primus" in architecture["network_class_name"] else ResidualEncoderUNet
    network = cls(channels, num_classes=3, deep_supervision=True, **architecture["arch_kwargs"]).train()
    cost = network_cost(architecture, size, channels, 3)
    assert cost.parameters == sum(p.numel() for p in network.parameters())
    x = torch.randn(1, channels, *size)
    assert saved_bytes(network, x) / 4 == pytest.approx(cost.values, rel=TOLERANCE)
    # memory_gb's 2.5 bytes under autocast bound what CPU autocast saves, and not by much
    autocast = saved_bytes(network, x, bf16=True) - 2 * cost.parameters
    assert 2.0 < autocast / cost.values < 2.5


def swin_network(architecture: dict[str, Any], channels: int) -> nn.Module:
    pytest.importorskip("monai", reason="Swin UNETR needs MONAI (extra: swin)")
    return SegmentationSwinUNETR(channels, 3, deep_supervision=True, **architecture["arch_kwargs"]).train()


@pytest.mark.parametrize(
    ("changes", "size", "channels"),
    [({}, (32, 32, 64), 2), ({"window_size": 3, "depths": [1, 1, 1, 1]}, (64, 32, 32), 1)],
)
def test_parameters_values_and_operations_of_swin_match_torch(changes, size, channels):
    network = swin_network(swin(**changes), channels)
    cost = network_cost(swin(**changes), size, channels, 3)
    assert cost.parameters == sum(p.numel() for p in network.parameters())
    x = torch.randn(1, channels, *size)
    assert saved_bytes(network, x) / 4 == pytest.approx(cost.values, rel=0.02)
    autocast = saved_bytes(network, x, bf16=True) - 2 * cost.parameters
    assert 0.8 < autocast / (2.5 * cost.values + 3.5 * cost.probabilities) < 1
    assert cost.macs == pytest.approx(operations(network, x), rel=0.001)


def operations(network: nn.Module, x: torch.Tensor) -> float:
    """Multiply-accumulates of a forward pass."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(x)
    return counter.get_total_flops() / 2


def test_multiply_accumulates_match_torch():
    for architecture, size, channels in (CASES[0], CASES[6], CASES[7]):
        cls = SegmentationPrimus if "primus" in architecture["network_class_name"] else ResidualEncoderUNet
        network = cls(channels, num_classes=3, deep_supervision=True, **architecture["arch_kwargs"])
        cost = network_cost(architecture, size, channels, 3)
        assert cost.macs == pytest.approx(operations(network, torch.randn(1, channels, *size)), rel=0.01)


def test_memory_by_hand():
    cost = Cost(parameters=1_000_000, values=10_000_000, macs=0)
    # 1 GB overhead; 18 MB states; 2 cases x 25 MB
    assert memory_gb(cost, 2) == pytest.approx(1 + 0.018 + 0.05)
    assert memory_gb(cost, 2, precision="fp32") == pytest.approx(1 + 0.016 + 0.08)
    local = Cost(parameters=1_000_000, values=1_000_000, macs=0)
    dino = Views(global_views=2, local_views=8, teacher=True)
    assert memory_gb(cost, 1, local=local, views=dino) == pytest.approx(1 + 0.022 + (2 * 10 + 8 * 1) * 2.5e-3)
    heads = replace(dino, heads=500_000, logits=1_000_000)  # half as many parameters again; 18 bytes per logit and case
    expected = 1 + 0.033 + 2 * ((2 * 10 + 8 * 1) * 2.5e-3 + 0.018)
    assert memory_gb(cost, 2, local=local, views=heads) == pytest.approx(expected)


def test_nnunet_resenc_m_agrees_with_nnunets_own_statement():
    """nnU-Net: ResEnc M at 128^3 or the like and batch 2 needs 9-11 GB."""
    arch = resenc(
        n_stages=6,
        features_per_stage=[32, 64, 128, 256, 320, 320],
        kernel_sizes=[[3, 3, 3]] * 6,
        strides=[[1, 1, 1]] + [[2, 2, 2]] * 5,
        n_blocks_per_stage=[1, 3, 4, 6, 6, 6],
        n_conv_per_stage_decoder=[1] * 5,
    )
    assert 8 < memory_gb(network_cost(arch, (128, 160, 112), 1, 3), 2) < 11


def test_largest_batch():
    assert largest_batch(lambda size: size <= 5, most=8) == 5
    assert largest_batch(lambda size: False, most=8) == 2
    assert largest_batch(lambda size: True, most=8) == 8


@pytest.mark.parametrize("planner", [nnsslPlannerPrimusB, nnsslPlannerSwinUNETR])
def test_local_views_count_when_the_patch_is_chosen(nnunet_env, planner):
    """The patch leaves memory for all views of the smallest batch."""
    write_dataset(nnunet_env, (160, 160, 160), cases=1)
    patches = {}
    for views in (Views(2, 0, True), Views(2, 8, True)):
        made = planner(9)
        made.views = views
        found = configuration_of(made.make_plans(), "3d_fullres")["nnssl"]
        assert found["memory_gb"]["estimate"] <= found["memory_gb"]["target"]
        patches[views.local_views] = np.prod(found["global_crop"])
    assert patches[8] < patches[0]
