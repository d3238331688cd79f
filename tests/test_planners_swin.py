import numpy as np
import pytest
import torch
from test_planners_plans import write_dataset

from nnssl_ext.errors import NnsslError
from nnssl_ext.networks.build import build_backbone, build_network
from nnssl_ext.planners.overrides import Overrides
from nnssl_ext.planners.swin import nnsslPlannerSwinUNETR
from nnssl_ext.plans import configuration_of, pretrain_plan


def test_the_plan_is_the_thesis_encoder_with_patches_of_whole_strides(nnunet_env):
    write_dataset(nnunet_env, (150, 60, 100), (1.0, 2.0, 1.0))
    plans = nnsslPlannerSwinUNETR(9).make_plans()
    found = configuration_of(plans, "3d_fullres")
    assert found["architecture"]["arch_kwargs"] == {
        "feature_size": 48,
        "depths": [2, 2, 2, 2],
        "num_heads": [3, 6, 12, 24],
        "window_size": 7,
        "drop_path_rate": 0.1,
        "strides": [[1, 1, 1]] + [[2, 2, 2]] * 5,
    }
    plan = pretrain_plan(plans, "3d_fullres", 1)
    assert plan.preset == "SwinUNETR"
    assert all(edge % 32 == 0 for edge in (*plan.global_crop, *plan.local_crop))
    assert found["nnssl"]["memory_gb"]["estimate"] <= 24
    assert found["nnssl"]["backbone"] == "swin" and found["nnssl"]["token_size"] is None


def test_tiny_volumes_still_plan_a_patch_that_the_network_can_take(nnunet_env):
    pytest.importorskip("monai", reason="Swin UNETR needs MONAI (extra: swin)")
    write_dataset(nnunet_env, (9, 11, 10))
    plans = nnsslPlannerSwinUNETR(9).plan_experiment()
    found = configuration_of(plans, "3d_fullres")
    assert found["patch_size"] == [32, 64, 32]
    small = {"feature_size": 12, "num_heads": [1, 2, 4, 8], "window_size": 3}
    plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"] |= small
    network = build_network(plans, "3d_fullres", 1, 2)  # in training mode, as nnU-Net starts
    assert network(torch.zeros(2, 1, *found["patch_size"])).shape[2:] == tuple(found["patch_size"])


def test_the_deepest_map_of_the_planned_encoder_has_768_channels(nnunet_env):
    pytest.importorskip("monai", reason="Swin UNETR needs MONAI (extra: swin)")
    write_dataset(nnunet_env, (40, 40, 40))
    backbone = build_backbone(nnsslPlannerSwinUNETR(9).make_plans(), "3d_fullres", 1)
    assert backbone.channels[-1] == 768
    # MONAI states 62.2 million for its Swin UNETR of feature size 48
    assert sum(p.numel() for p in backbone.network.parameters()) == pytest.approx(62.2e6, rel=0.001)


def test_what_the_network_cannot_take_is_refused(nnunet_env):
    write_dataset(nnunet_env, (40, 40, 40))
    for overrides, message in (
        (Overrides(patch_size=(48, 64, 64)), r"patch \[48, 64, 64\] is no multiple"),
        (Overrides(patch_size=(32, 32, 32)), "too small"),
        (Overrides(token_size=(4, 4, 4)), "tokens of SwinUNETR are fixed"),
    ):
        planner = nnsslPlannerSwinUNETR(9)
        planner.overrides = overrides
        with pytest.raises(NnsslError, match=message):
            planner.make_plans()


def test_memory_decides_on_the_patch(nnunet_env):
    write_dataset(nnunet_env, (200, 200, 200), cases=2)
    patches = [
        configuration_of(nnsslPlannerSwinUNETR(9, gpu_memory_target_in_gb=gb).make_plans(), "3d_fullres")["patch_size"]
        for gb in (8.0, 24.0)
    ]
    assert np.prod(patches[0]) < np.prod(patches[1])
