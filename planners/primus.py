"""Planners for Primus, a transformer on tokens of the volume."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner

from nnssl_ext.errors import NnsslError
from nnssl_ext.networks.presets import PRIMUS_PRESETS
from nnssl_ext.planners.base import PretrainingPlanner
from nnssl_ext.planners.sizes import initial_patch, shrink, token_size, token_strides
from nnssl_ext.records import Size

MOST_TOKENS = 8000
"""160 voxels per axis in tokens of 8, the published Primus: beyond it attention, quadratic in tokens, costs most."""

TINY_MOST_VOXELS = 40 * 56 * 40
"""Patch that one CPU core trains on at under a second per iteration of batch 2; holds a whole hippocampus crop."""


class PrimusPlanner(PretrainingPlanner, ExperimentPlanner):
    """Token, patch and batch size for `SegmentationPrimus`."""

    backbone = "primus"
    most_voxels: ClassVar[int | None] = None

    def get_plans_for_configuration(
        self,
        spacing: Float[np.ndarray, " axes"],
        median_shape: Float[np.ndarray, " axes"],
        data_identifier: str,
        approximate_n_voxels_dataset: float,
        _cache: dict[str, Any],
    ) -> dict[str, Any]:
        """One configuration of the plans; arguments as nnU-Net passes them."""
        preset = PRIMUS_PRESETS[self.preset]
        millimetres, median = spacing.tolist(), median_shape.tolist()
        token, token_reason = token_size(millimetres, median, preset.token_size)
        if self.overrides.token_size:
            token, token_reason = _checked_token(self.overrides.token_size), "asked for"
        target = float(self.UNet_vram_target_GB)

        def step_gb(size: Size) -> Callable[[int], float]:
            return self.step_gb(self.architecture(token, size), size, token)

        def fits(size: Size) -> bool:
            small = self.most_voxels is None or math.prod(size) <= self.most_voxels
            few = math.prod(size) // math.prod(token) <= MOST_TOKENS
            return small and few and step_gb(size)(self.UNet_min_batch_size) <= target

        patch = self.overrides.patch_size or shrink(initial_patch(millimetres, median, token), median, token, fits)
        if any(edge % t for edge, t in zip(patch, token, strict=True)):
            raise NnsslError(
                f"patch {list(patch)} is no multiple of the token {list(token)}",
                "choose another --patch_size or --token_size",
            )
        batch = self.fitting_batch(step_gb(patch))
        configuration = self.own_configuration(
            millimetres, median, data_identifier, self.architecture(token, patch), patch
        )
        configuration["batch_size"] = self.supervised_batch(batch, patch, approximate_n_voxels_dataset)
        why = "asked for" if self.overrides.patch_size else self._patch_reason(patch, median, target)
        reasons = {"token_size": token_reason, "global_crop": why}
        configuration["nnssl"] = self.nnssl_block(configuration, token, token, reasons)
        return configuration

    def architecture(self, token: Size, patch: Size) -> dict[str, Any]:
        """The network's entry in the plans."""
        from nnssl_ext.networks.primus import default_decoder_widths

        preset = PRIMUS_PRESETS[self.preset]
        strides = token_strides(token)
        return {
            "network_class_name": "nnssl_ext.networks.primus.SegmentationPrimus",
            "arch_kwargs": {
                "embed_dim": preset.embed_dim,
                "eva_depth": preset.depth,
                "eva_numheads": preset.num_heads,
                "input_shape": list(patch),
                "strides": strides,
                "num_register_tokens": 0,
                "class_token": False,
                "drop_path_rate": preset.drop_path_rate,
                "init_values": preset.init_values,
                "scale_attn_inner": preset.scale_attn_inner,
                "decoder_widths": default_decoder_widths(preset.embed_dim, len(strides) - 1),
            },
            "_kw_requires_import": [],
        }

    def _patch_reason(self, patch: Size, median: list[float], target: float) -> str:
        if all(edge >= length for edge, length in zip(patch, median, strict=True)):
            return "covers the median case"
        limits = f"{target:g} GB at batch {self.UNet_min_batch_size} and {MOST_TOKENS} tokens allow"
        if self.most_voxels:
            limits += f", and {self.most_voxels} voxels, which a CPU can train on"
        return f"isotropic in mm, as large as the median case, {limits}"


def _checked_token(token: Size) -> Size:
    if any(t < 1 or t & (t - 1) for t in token) or max(token) < 2:
        raise NnsslError(f"token of {list(token)} voxels", "use powers of 2, at least one of them above 1, e.g. 8 8 8")
    return token


class nnsslPlannerPrimusTiny(PrimusPlanner):
    """Trains on a CPU."""

    preset = "PrimusTiny"
    default_memory_gb = 2.0
    most_supervised = 2
    most_voxels = TINY_MOST_VOXELS


class nnsslPlannerPrimusS(PrimusPlanner):
    """Primus-S for 8 GB."""

    preset = "PrimusS"
    default_memory_gb = 8.0


class nnsslPlannerPrimusB(PrimusPlanner):
    """Primus-B for 16 GB."""

    preset = "PrimusB"
    default_memory_gb = 16.0


class nnsslPlannerPrimusM(PrimusPlanner):
    """Primus-M for 24 GB."""

    preset = "PrimusM"
    default_memory_gb = 24.0


class nnsslPlannerPrimusL(PrimusPlanner):
    """Primus-L for 40 GB."""

    preset = "PrimusL"
    default_memory_gb = 40.0
