"""A job on made-up data, to measure any backbone at any size without a dataset."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.ndimage import gaussian_filter

from nnssl_ext.catalogue import load_method
from nnssl_ext.data.cases import list_cases
from nnssl_ext.engine.job import Job
from nnssl_ext.engine.settings import RunSettings
from nnssl_ext.errors import unknown_name
from nnssl_ext.networks.presets import PRIMUS_PRESETS, RESENC_PRESETS
from nnssl_ext.plans import pretrain_plan
from nnssl_ext.records import Size

CONFIGURATION = "3d_fullres"
SPACING = (1.0, 1.0, 1.0)


def synthetic_job(preset: str, crop: Size, method: str, run: RunSettings, folder: Path) -> Job:
    """A job of `method` on two smooth random cases of 1.6 times the crop (a crop of 160 from 256 voxels), in `folder`.

    Raises:
        NnsslError: unknown preset or method.
    """
    if preset not in {**PRIMUS_PRESETS, **RESENC_PRESETS}:
        raise unknown_name("preset", preset, {**PRIMUS_PRESETS, **RESENC_PRESETS})
    plans = synthetic_plans(preset, crop, run.batch_size)
    plan = pretrain_plan(plans, CONFIGURATION, channels=1)
    write_cases(folder, crop)
    return Job(
        method=method,
        settings=load_method(method).settings_type.for_plan(plan),
        run=run,
        dataset="synthetic",
        plans=plans,
        plan=plan,
        cases=tuple(list_cases(folder, SPACING)),
        output=folder,
    )


def synthetic_plans(preset: str, crop: Size, batch_size: int) -> dict[str, Any]:
    """Plans of one configuration at 1 mm; nnU-Net's own rule decides where a U-Net pools. The local crop is half the global
    one, as our planners have it."""
    primus = preset in PRIMUS_PRESETS
    token = [PRIMUS_PRESETS[preset].token_size] * 3 if primus else None
    architecture = _primus(preset, crop) if primus else _resenc(preset, crop)
    coarsest = [math.prod(axis) for axis in zip(*architecture["arch_kwargs"]["strides"], strict=True)]
    local = [math.ceil(edge / 2 / stride) * stride for edge, stride in zip(crop, coarsest, strict=True)]
    block = {"preset": preset, "token_size": token, "global_crop": list(crop), "batch_size": batch_size}
    configuration = {
        "spacing": list(SPACING),
        "patch_size": list(crop),
        "batch_size": batch_size,
        "normalization_schemes": ["ZScoreNormalization"],
        "architecture": architecture,
        "nnssl": {**block, "local_crop": local},
    }
    return {"plans_name": f"synthetic{preset}Plans", "configurations": {CONFIGURATION: configuration}}


def write_cases(folder: Path, crop: Size, number: int = 2) -> None:
    """Save z-scored smooth noise with nnU-Net's own function, compressed and chunked for this crop."""
    from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2

    folder.mkdir(parents=True, exist_ok=True)
    shape: Size = (_larger(crop[0]), _larger(crop[1]), _larger(crop[2]))
    for case in range(number):
        image = _smooth_noise(shape, case)[None]
        blocks, chunks = comp_blosc2_params(image.shape, crop)
        target = str(folder / f"synthetic_{case}")
        nnUNetDatasetBlosc2.save_case(image, np.zeros(image.shape, np.int8), {}, target, chunks=chunks, blocks=blocks)


def _larger(length: int) -> int:
    return math.ceil(1.6 * length)


def _smooth_noise(shape: Size, seed: int) -> Float[np.ndarray, "Z Y X"]:
    noise = gaussian_filter(np.random.default_rng(seed).standard_normal(shape, np.float32), 1.5)
    return (noise - noise.mean()) / noise.std()


def _primus(preset: str, crop: Size) -> dict[str, Any]:
    sizes = PRIMUS_PRESETS[preset]
    halvings = round(math.log2(sizes.token_size))
    return {
        "network_class_name": "nnssl_ext.networks.primus.SegmentationPrimus",
        "arch_kwargs": {
            "embed_dim": sizes.embed_dim,
            "eva_depth": sizes.depth,
            "eva_numheads": sizes.num_heads,
            "input_shape": list(crop),
            "strides": [[1, 1, 1], *[[2, 2, 2]] * halvings],
            "drop_path_rate": sizes.drop_path_rate,
            "init_values": sizes.init_values,
            "scale_attn_inner": sizes.scale_attn_inner,
        },
        "_kw_requires_import": [],
    }


def _resenc(preset: str, crop: Size) -> dict[str, Any]:
    from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props

    sizes = RESENC_PRESETS[preset]
    _, strides, kernels, _, _ = get_pool_and_conv_props(SPACING, crop, 4, 999999)
    stages = min(len(strides), sizes.max_stages or len(strides))
    blocks = (*sizes.blocks_per_stage, *sizes.blocks_per_stage[-1:] * stages)[:stages]
    return {
        "network_class_name": "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
        "arch_kwargs": {
            "n_stages": stages,
            "features_per_stage": [min(sizes.base_features * 2**stage, sizes.max_features) for stage in range(stages)],
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": [list(kernel) for kernel in kernels[:stages]],
            "strides": [list(stride) for stride in strides[:stages]],
            "n_blocks_per_stage": list(blocks),
            "n_conv_per_stage_decoder": [1] * (stages - 1),
            "conv_bias": True,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
