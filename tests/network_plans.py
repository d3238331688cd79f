"""Small plans as nnU-Net writes them, for tests that build networks."""

from __future__ import annotations

from typing import Any

PRIMUS = "nnssl_ext.networks.primus.SegmentationPrimus"
RESENC = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
SWIN = "nnssl_ext.networks.swin_unetr.SegmentationSwinUNETR"
PLAIN = "dynamic_network_architectures.architectures.unet.PlainConvUNet"


def plans_of(network_class: str, arch_kwargs: dict[str, Any], to_import: tuple[str, ...] = ()) -> dict[str, Any]:
    """Plans with one configuration, 3d_fullres, that names this network."""
    architecture = {
        "network_class_name": network_class,
        "arch_kwargs": arch_kwargs,
        "_kw_requires_import": list(to_import),
    }
    return {"plans_name": "testPlans", "configurations": {"3d_fullres": {"architecture": architecture}}}


def primus_plans(**changes: Any) -> dict[str, Any]:
    """A Primus of 24 channels on 4x4x4 tokens of 4 voxels, without stochastic depth."""
    kwargs = {
        "embed_dim": 24,
        "eva_depth": 2,
        "eva_numheads": 2,
        "input_shape": [16, 16, 16],
        "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]],
        "drop_path_rate": 0.0,
    }
    return plans_of(PRIMUS, {**kwargs, **changes})


def unet_plans(network_class: str = RESENC) -> dict[str, Any]:
    """A three-stage U-Net, the last stride anisotropic."""
    blocks = "n_blocks_per_stage" if network_class == RESENC else "n_conv_per_stage"
    kwargs = {
        "n_stages": 3,
        "features_per_stage": [4, 8, 16],
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[3, 3, 3]] * 3,
        "strides": [[1, 1, 1], [2, 2, 2], [1, 2, 2]],
        blocks: [1, 2, 2],
        "n_conv_per_stage_decoder": [1, 1],
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    return plans_of(network_class, kwargs, ("conv_op", "norm_op", "dropout_op", "nonlin"))


def swin_plans(**changes: Any) -> dict[str, Any]:
    """A Swin UNETR of 12 channels with one block per stage, without stochastic depth."""
    kwargs = {
        "feature_size": 12,
        "depths": [1, 1, 1, 1],
        "num_heads": [1, 2, 4, 8],
        "window_size": 3,
        "strides": [[1, 1, 1]] + [[2, 2, 2]] * 5,
    }
    return plans_of(SWIN, {**kwargs, **changes})
