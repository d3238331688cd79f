"""Planners for nnU-Net's residual encoder U-Net: nnU-Net's own topology and patch, our data, batch and crops."""

from __future__ import annotations

import math
from typing import Any, ClassVar, cast

import numpy as np
from jaxtyping import Float
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    ResEncUNetPlanner,
)
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

from nnssl_ext.errors import NnsslError
from nnssl_ext.networks.presets import RESENC_PRESETS
from nnssl_ext.planners.base import PretrainingPlanner
from nnssl_ext.records import Size


class ResEncPlanner(PretrainingPlanner, ResEncUNetPlanner):
    """nnU-Net's planning of ``ResidualEncoderUNet`` with the sizes of a preset.

    Class attributes:
        reference_features: feature map values that fit the preset's memory at batch 2, in nnU-Net's count (nnU-Net's own
            numbers for M, L and XL).
        min_edge: nnU-Net's shortest edge of the deepest feature map.
        sized_for: what else to say about the patch.
    """

    backbone = "resenc"
    reference_features: ClassVar[float]
    min_edge: ClassVar[int] = 4
    sized_for: ClassVar[str] = ""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        preset = RESENC_PRESETS[self.preset]
        self.UNet_base_num_features = preset.base_features
        self.UNet_max_features_3d = preset.max_features
        self.UNet_blocks_per_stage_encoder = preset.blocks_per_stage + preset.blocks_per_stage[-1:] * 8
        self.UNet_featuremap_min_edge_length = self.min_edge
        self.UNet_reference_val_3d = self.reference_features
        self.UNet_reference_val_corresp_GB = preset.memory_gb

    def get_plans_for_configuration(
        self,
        spacing: Float[np.ndarray, " axes"],
        median_shape: Float[np.ndarray, " axes"],
        data_identifier: str,
        approximate_n_voxels_dataset: float,
        _cache: dict[str, Any],
    ) -> dict[str, Any]:
        """One configuration of the plans; arguments as nnU-Net passes them."""
        if self.overrides.token_size:
            raise NnsslError(f"{self.preset} has no tokens", "leave out --token_size, or use a Primus planner")
        if get_allowed_n_proc_DA() < 1:  # nnU-Net estimates memory with so many threads
            raise NnsslError(
                "nnUNet_n_proc_DA=0: nnU-Net cannot plan a U-Net so", "export nnUNet_n_proc_DA=1 for planning"
            )
        configuration = super().get_plans_for_configuration(
            spacing, median_shape, data_identifier, approximate_n_voxels_dataset, _cache
        )
        arch = configuration["architecture"]["arch_kwargs"]
        _truncate(arch, RESENC_PRESETS[self.preset].max_stages or arch["n_stages"])
        if arch["n_stages"] < 2:
            raise NnsslError(
                f"a patch of {[int(edge) for edge in configuration['patch_size']]} voxels leaves {type(self).__name__} a single stage, without a decoder",
                "use nnsslPlannerPrimusTiny or nnsslPlannerResEncM, or a finer -overwrite_target_spacing",
            )
        divisor = cast(Size, tuple(math.prod(axis) for axis in np.array(arch["strides"]).T.tolist()))
        reason = f"nnU-Net's rule for {self.UNet_vram_target_GB:g} GB{self.sized_for}"
        if self.overrides.patch_size:
            configuration["patch_size"], reason = list(self.overrides.patch_size), "asked for"
        patch = cast(Size, tuple(int(edge) for edge in configuration["patch_size"]))
        if any(edge % d for edge, d in zip(patch, divisor, strict=True)):
            raise NnsslError(f"patch {list(patch)} is no multiple of {list(divisor)}", "choose another --patch_size")
        if patch == divisor:
            raise NnsslError(
                f"a patch of {list(patch)} voxels is a single place of the deepest feature map, which cannot be normalised",
                f"give a --patch_size with an edge of at least twice that of {list(divisor)}",
            )
        fitting = int(configuration["batch_size"])
        if self.overrides.patch_size:  # nnU-Net's is for its own patch
            fitting = self.fitting_batch(self.step_gb(configuration["architecture"], patch, divisor))
        configuration["batch_size"] = self.supervised_batch(fitting, patch, approximate_n_voxels_dataset)
        configuration["nnssl"] = self.nnssl_block(configuration, divisor, None, {"global_crop": reason})
        return configuration


def _truncate(arch: dict[str, Any], stages: int) -> None:
    """Drop encoder stages beyond `stages` and their decoder stages."""
    arch["n_stages"] = stages = min(stages, arch["n_stages"])
    for name in ("features_per_stage", "kernel_sizes", "strides", "n_blocks_per_stage"):
        arch[name] = arch[name][:stages]
    arch["n_conv_per_stage_decoder"] = arch["n_conv_per_stage_decoder"][: stages - 1]


class nnsslPlannerResEncTiny(ResEncPlanner):
    """Trains on a CPU."""

    preset = "ResEncTiny"
    sized_for = ", which this preset scales to what a CPU can train on"
    default_memory_gb = RESENC_PRESETS["ResEncTiny"].memory_gb
    most_supervised = 2
    min_edge = 8  # pool no deeper than the preset's three stages need: patches in multiples of 4
    reference_features = (
        10_500_000.0  # 40x56x40 voxels; a hippocampus crop takes 0.4-0.6 CPU-seconds per step of batch 2
    )


class nnsslPlannerResEncM(ResEncPlanner):
    """nnU-Net's ResEnc M: 8 GB (nnU-Net: peaks at 9-11)."""

    preset = "ResEncM"
    default_memory_gb = RESENC_PRESETS["ResEncM"].memory_gb
    reference_features = 680_000_000.0


class nnsslPlannerResEncL(ResEncPlanner):
    """nnU-Net's ResEnc L: 24 GB."""

    preset = "ResEncL"
    default_memory_gb = RESENC_PRESETS["ResEncL"].memory_gb
    reference_features = 2_100_000_000.0


class nnsslPlannerResEncXL(ResEncPlanner):
    """nnU-Net's ResEnc XL: 40 GB."""

    preset = "ResEncXL"
    default_memory_gb = RESENC_PRESETS["ResEncXL"].memory_gb
    reference_features = 3_600_000_000.0
