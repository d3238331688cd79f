"""Plans of small networks, and backbones with recognisable weights, for the checkpoint tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

SPACING = [1.0, 1.0, 1.0]


def plans_of(architecture: dict[str, Any], patch: list[int], name: str = "nnsslTestPlans") -> dict[str, Any]:
    """nnU-Net plans with one 3D configuration."""
    return {
        "dataset_name": "Dataset004_Hippocampus",
        "plans_name": name,
        "original_median_spacing_after_transp": SPACING,
        "original_median_shape_after_transp": [36, 50, 35],
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "experiment_planner_used": "nnsslPlannerTest",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": {"mean": 10.0, "std": 2.0}},
        "configurations": {
            "3d_fullres": {
                "data_identifier": f"{name}_3d_fullres",
                "preprocessor_name": "DefaultPreprocessor",
                "batch_size": 2,
                "patch_size": patch,
                "spacing": SPACING,
                "normalization_schemes": ["ZScoreNormalization"],
                "use_mask_for_norm": [False],
                "architecture": architecture,
            }
        },
    }


def primus(patch: list[int], strides: int = 2, **changes: Any) -> dict[str, Any]:
    """A SegmentationPrimus of tokens of 2**strides voxels."""
    kwargs = {
        "embed_dim": 36,
        "eva_depth": 2,
        "eva_numheads": 2,
        "input_shape": patch,
        "strides": [[1, 1, 1]] + [[2, 2, 2]] * strides,
        "drop_path_rate": 0.0,
    }
    return {
        "network_class_name": "nnssl_ext.networks.primus.SegmentationPrimus",
        "arch_kwargs": {**kwargs, **changes},
        "_kw_requires_import": [],
    }


def resenc(stages: int = 3, kernels: list[int] | None = None, **changes: Any) -> dict[str, Any]:
    """nnU-Net's ResidualEncoderUNet, as its planners write it."""
    kwargs = {
        "n_stages": stages,
        "features_per_stage": [4, 8, 12, 16][:stages],
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [kernels or [3, 3, 3]] * stages,
        "strides": [[1, 1, 1]] + [[2, 2, 2]] * (stages - 1),
        "n_blocks_per_stage": [1, 2, 2, 2][:stages],
        "n_conv_per_stage_decoder": [1] * (stages - 1),
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    return {
        "network_class_name": "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
        "arch_kwargs": {**kwargs, **changes},
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def swin(**changes: Any) -> dict[str, Any]:
    """A SegmentationSwinUNETR of 12 channels; skips the test where MONAI is missing."""
    pytest.importorskip("monai", reason="Swin UNETR needs MONAI (extra: swin)")
    kwargs = {
        "feature_size": 12,
        "depths": [1, 1, 1, 1],
        "num_heads": [1, 2, 4, 8],
        "window_size": 3,
        "strides": [[1, 1, 1]] + [[2, 2, 2]] * 5,
    }
    return {
        "network_class_name": "nnssl_ext.networks.swin_unetr.SegmentationSwinUNETR",
        "arch_kwargs": {**kwargs, **changes},
        "_kw_requires_import": [],
    }


def shake(network: nn.Module, seed: int = 0) -> None:
    """Give every parameter values of its own, as training does: fresh norms and biases are all alike."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def content_of(plans: dict[str, Any], input_channels: int = 1, seed: int = 0, **changes: Any) -> dict[str, Any]:
    """A checkpoint of ours whose encoder and decoder are trained and whose segmentation heads are not."""
    from nnssl_ext.checkpoints.content import checkpoint_content
    from nnssl_ext.networks.build import build_backbone

    backbone = build_backbone(plans, "3d_fullres", input_channels)
    shake(backbone.network, seed)
    given = {
        "backbone": backbone,
        "plans": plans,
        "configuration": "3d_fullres",
        "method": "MAETrainer",
        "settings": {"mask_ratio": 0.75},
        "citations": ("He, K., et al. (2022). Masked autoencoders are scalable vision learners. CVPR.",),
        "pretrained_prefixes": backbone.encoder_prefixes + backbone.decoder_prefixes,
        "data_summary": {"dataset": "Dataset004_Hippocampus", "cases": 200, "median_spacing": SPACING},
        "progress": {"epoch": 3, "step": 750},
    }
    return checkpoint_content(**{**given, **changes})


DATASET_JSON = {
    "channel_names": {"0": "MRI"},
    "labels": {"background": 0, "Anterior": 1, "Posterior": 2},
    "numTraining": 3,
    "file_ending": ".nii.gz",
}


def nnssl_checkpoint(
    name: str, network: nn.Module, patch: list[int], kwargs: dict[str, Any] | None = None
) -> dict[str, Any]:
    """A file as nnssl's MAE trainers write it (reference measured on nnssl 70448644), around a network of DNA's.

    Primus weights get the MAE decoder and mask token that nnssl's EvaMAE has beside them.
    """
    weights = {key: value.clone() for key, value in network.state_dict().items() if "seg_layers" not in key}
    plan: dict[str, Any] = {
        "architecture_plans": {"arch_class_name": name, "arch_kwargs": kwargs, "arch_kwargs_requiring_import": None},
        "pretrain_plan": {
            "dataset_name": "Dataset745_OpenMind",
            "plans_name": "nnsslPlans",
            "configurations": {
                "onemmiso": {
                    "data_identifier": "nnsslPlans_onemmiso",
                    "spacing_style": "onemmiso",
                    "spacing": [1, 1, 1],
                    "normalization_schemes": ["ZScoreNormalization"],
                    "patch_size": patch,
                }
            },
        },
        "pretrain_num_input_channels": 1,
        "recommended_downstream_patchsize": patch,
    }
    if "Primus" in name:
        weights = {key: value for key, value in weights.items() if key.startswith(("eva.", "down_projection."))}
        weights |= {"mask_token": torch.zeros(1, 1, 4), "decoder.blocks.0.norm1.weight": torch.zeros(4)}
        plan |= {
            "key_to_encoder": "eva",
            "key_to_stem": "down_projection",
            "keys_to_in_proj": ["down_projection.proj"],
            "key_to_lpe": "eva.pos_embed",
        }
    else:
        plan |= {
            "key_to_encoder": "encoder.stages",
            "key_to_stem": "encoder.stem",
            "keys_to_in_proj": ["encoder.stem.convs.0.conv", "encoder.stem.convs.0.all_modules.0"],
            "key_to_lpe": None,
        }
    return {
        "network_weights": weights,
        "nnssl_adaptation_plan": plan,
        "optimizer_state": {"state": {}, "param_groups": []},
        "grad_scaler_state": None,
        "logging": {"train_losses": [1.0, 0.5], "lrs": [1e-2, 1e-3]},
        "_best_ema": None,
        "current_epoch": 1000,
        "init_args": {"pretrain_json": {"datasets": {"d": {"subjects": {"sub-SECRET": {}}}}}, "fold": "all"},
        "trainer_name": "BaseMAETrainer_BS8",
        "citations": [{"type": "Pretraining method", "name": "MAE", "apa_citations": ["Wald et al."]}],
    }
