"""A preprocessed dataset of smooth noise with plans of two very small networks, so that engine tests take seconds."""

from __future__ import annotations

import csv
import json
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from scipy.ndimage import gaussian_filter

from nnssl_ext.checkpoints.io import load_checkpoint
from nnssl_ext.cli import train
from nnssl_ext.engine.job import Job

DATASET = "Dataset901_Tiny"
CONFIGURATION = "3d_fullres"
CROP = (16, 16, 16)
BACKBONES = ("PrimusTiny", "ResEncTiny")

ARCHITECTURES = {
    "PrimusTiny": {
        "network_class_name": "nnssl_ext.networks.primus.SegmentationPrimus",
        "arch_kwargs": {
            "embed_dim": 24,
            "eva_depth": 2,
            "eva_numheads": 2,
            "input_shape": CROP,
            "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]],
            "drop_path_rate": 0.1,  # random numbers inside the network: resuming must reproduce them
        },
        "_kw_requires_import": [],
    },
    "ResEncTiny": {
        "network_class_name": "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
        "arch_kwargs": {
            "n_stages": 3,
            "features_per_stage": [4, 8, 16],
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": [[3, 3, 3]] * 3,
            "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]],
            "n_blocks_per_stage": [1, 1, 1],
            "n_conv_per_stage_decoder": [1, 1],
            "conv_bias": True,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    },
}


def plans_of(preset: str) -> dict:
    """Plans as our planners write them, for one preset."""
    resampling = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    return {
        "dataset_name": DATASET,
        "plans_name": f"nnssl{preset}Plans",
        "original_median_spacing_after_transp": [1.0, 1.0, 1.0],
        "original_median_shape_after_transp": [20, 18, 22],
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "experiment_planner_used": f"nnsslPlanner{preset}",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {},
        "configurations": {
            CONFIGURATION: {
                "data_identifier": "tiny_3d_fullres",
                "preprocessor_name": "DefaultPreprocessor",
                "batch_size": 2,
                "patch_size": list(CROP),
                "median_image_size_in_voxels": [20, 18, 22],
                "spacing": [1.0, 1.0, 1.0],
                "normalization_schemes": ["ZScoreNormalization"],
                "use_mask_for_norm": [False],
                "resampling_fn_data": "resample_data_or_seg_to_shape",
                "resampling_fn_data_kwargs": resampling,
                "resampling_fn_seg": "resample_data_or_seg_to_shape",
                "resampling_fn_seg_kwargs": {**resampling, "is_seg": True, "order": 1},
                "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
                "resampling_fn_probabilities_kwargs": {**resampling, "order": 1},
                "architecture": deepcopy(ARCHITECTURES[preset]),
                "nnssl": {
                    "schema": 1,
                    "backbone": "primus" if preset.startswith("Primus") else "resenc",
                    "preset": preset,
                    "token_size": [4, 4, 4] if preset.startswith("Primus") else None,
                    "global_crop": list(CROP),
                    "local_crop": [8, 8, 8],
                    "batch_size": 2,
                    "memory_gb": {"target": 1.0, "estimate": 0.1},
                    "reasons": {},
                },
            }
        },
    }


def write_dataset(preprocessed: Path, cases: int = 6) -> Path:
    """Write cases and plans below nnU-Net's preprocessed folder; returns the dataset's folder."""
    base = preprocessed / DATASET
    data = base / "tiny_3d_fullres"
    data.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(cases):
        shape = (1, *rng.integers(14, 24, 3).tolist())  # some smaller than the crop
        image = gaussian_filter(rng.normal(size=shape), (0, 2, 2, 2)).astype(np.float32)
        image = (image - image.mean()) / image.std()
        segmentation = (image > 0.5).astype(np.int8)
        properties = {"spacing": [1.0, 1.0, 1.0], "class_locations": {}}
        nnUNetDatasetBlosc2.save_case(image, segmentation, properties, str(data / f"case_{number:02d}"))
    for preset in BACKBONES:
        (base / f"nnssl{preset}Plans.json").write_text(json.dumps(plans_of(preset)))
    labels = {"background": 0, "bright": 1}
    (base / "dataset.json").write_text(
        json.dumps({"channel_names": {"0": "MRI"}, "labels": labels, "numTraining": cases, "file_ending": ".nii.gz"})
    )
    return base


def write_for_fine_tuning(preprocessed: Path, train: int, val: int) -> Path:
    """`write_dataset` with what stock fine-tuning wants beyond pretraining, for so many cases of the split."""
    base = write_dataset(preprocessed, cases=train + val)
    names = [f"case_{number:02d}" for number in range(train + val)]
    (base / "splits_final.json").write_text(json.dumps([{"train": names[:train], "val": names[train:]}]))
    (base / "dataset_fingerprint.json").write_text("{}")
    for backbone in BACKBONES:
        plans = plans_of(backbone)
        plans["configurations"][CONFIGURATION]["batch_dice"] = False
        (base / f"nnssl{backbone}Plans.json").write_text(json.dumps(plans))
    return base


def job_of(*flags: str, method: str = "MAETrainer", backbone: str = "PrimusTiny") -> Job:
    """What ``nnssl_train`` makes of these flags for the tiny dataset, on the CPU."""
    base = [DATASET, CONFIGURATION, "-tr", method, "-p", f"nnssl{backbone}Plans", "-device", "cpu"]
    args, rest = train.parser().parse_known_args([*base, *flags])
    return train._job(args, rest)


def log_of(job: Job) -> list[dict[str, str]]:
    with open(job.output / "training_log.csv", newline="") as file:
        return list(csv.DictReader(file))


def weights_of(job: Job, name: str = "checkpoint_final.pth") -> dict[str, torch.Tensor]:
    return load_checkpoint(job.output / name)["network_weights"]
