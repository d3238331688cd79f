"""Planner for Swin UNETR."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner

from nnssl_ext.errors import NnsslError
from nnssl_ext.networks.presets import SWIN_PRESETS
from nnssl_ext.planners.base import PretrainingPlanner
from nnssl_ext.planners.sizes import initial_patch, shrink
from nnssl_ext.records import Size

DIVISOR: Size = (32, 32, 32)
"""Five halvings along every axis, whatever the spacing: MONAI's layout."""


class nnsslPlannerSwinUNETR(PretrainingPlanner, ExperimentPlanner):
    """Patch and batch size for `SegmentationSwinUNETR` in 24 GB. Needs the extra ``swin`` (MONAI) to train, not to plan."""

    backbone = "swin"
    preset = "SwinUNETR"
    default_memory_gb = 24.0

    def get_plans_for_configuration(
        self,
        spacing: Float[np.ndarray, " axes"],
        median_shape: Float[np.ndarray, " axes"],
        data_identifier: str,
        approximate_n_voxels_dataset: float,
        _cache: dict[str, Any],
    ) -> dict[str, Any]:
        """One configuration of the plans; arguments as nnU-Net passes them.

        Raises:
            NnsslError: a token size, which Swin UNETR has not to choose, or a patch that it cannot take.
        """
        if self.overrides.token_size:
            raise NnsslError(
                f"the tokens of {self.preset} are fixed", "leave out --token_size, or use a Primus planner"
            )
        millimetres, median = spacing.tolist(), median_shape.tolist()
        architecture = self.architecture()
        target = float(self.UNet_vram_target_GB)

        def fits(patch: Size) -> bool:
            return self.step_gb(architecture, patch, DIVISOR)(self.UNet_min_batch_size) <= target

        start = _at_least_two_places(initial_patch(millimetres, median, DIVISOR), median)
        patch = self.overrides.patch_size or shrink(start, median, DIVISOR, fits)
        self._check(patch)
        configuration = self.own_configuration(millimetres, median, data_identifier, architecture, patch)
        batch = self.fitting_batch(self.step_gb(architecture, patch, DIVISOR))
        configuration["batch_size"] = self.supervised_batch(batch, patch, approximate_n_voxels_dataset)
        why = f"isotropic in mm, as large as the median case or {target:g} GB allow, in multiples of 32 voxels"
        reasons = {"global_crop": "asked for" if self.overrides.patch_size else why}
        configuration["nnssl"] = self.nnssl_block(configuration, DIVISOR, None, reasons)
        return configuration

    def architecture(self) -> dict[str, Any]:
        """The network's entry in the plans."""
        from nnssl_ext.networks.swin_unetr import STRIDES

        preset = SWIN_PRESETS[self.preset]
        return {
            "network_class_name": "nnssl_ext.networks.swin_unetr.SegmentationSwinUNETR",
            "arch_kwargs": {
                "feature_size": preset.feature_size,
                "depths": list(preset.depths),
                "num_heads": list(preset.num_heads),
                "window_size": preset.window_size,
                "drop_path_rate": preset.drop_path_rate,
                "strides": [list(stride) for stride in STRIDES],
            },
            "_kw_requires_import": [],
        }

    def _check(self, patch: Size) -> None:
        if any(edge % d for edge, d in zip(patch, DIVISOR, strict=True)):
            raise NnsslError(f"patch {list(patch)} is no multiple of {list(DIVISOR)}", "choose another --patch_size")
        if patch == DIVISOR:
            raise NnsslError(
                f"a patch of {list(patch)} voxels is too small for {self.preset}",
                "give a --patch_size with an edge of at least 64, or use another planner, e.g. nnsslPlannerPrimusM",
            )


def _at_least_two_places(patch: Size, median: list[float]) -> Size:
    """A patch whose deepest map has more than one place, as the decoder's instance norm demands."""
    if patch != DIVISOR:
        return patch
    longest = int(np.argmax(median))
    z, y, x = (edge * 2 if axis == longest else edge for axis, edge in enumerate(patch))
    return z, y, x
