"""What our planners share: nnU-Net's planner, fed with a label-free fingerprint, writing what pretraining needs beside it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from nnunetv2.configuration import default_num_processes
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
from nnunetv2.utilities.dataset_name_id_conversion import convert_dataset_name_to_id, maybe_convert_to_dataset_name

from nnssl_ext.errors import NnsslError
from nnssl_ext.files import read_json
from nnssl_ext.paths import folder
from nnssl_ext.planners.fingerprint import label_free_fingerprint
from nnssl_ext.planners.memory import Views, largest_batch, memory_gb, network_cost
from nnssl_ext.planners.normalization import choose_normalization
from nnssl_ext.planners.overrides import Overrides, check_options
from nnssl_ext.planners.preview import describe
from nnssl_ext.planners.raw_dataset import require_labels
from nnssl_ext.planners.sizes import local_crop
from nnssl_ext.plans import FINETUNING
from nnssl_ext.records import Size

MOST_CASES = 8
"""Largest batch: nnssl's published pretraining runs used 8 cases per GPU; beyond, small data sets get endless epochs."""


class PretrainingPlanner(ExperimentPlanner):
    """Plans 3d_fullres only. Subclasses say which network, and derive from one of nnU-Net's planners.

    Class attributes:
        backbone, preset: as in the ``nnssl`` block of the plans (`nnssl_ext.plans`).
        default_memory_gb: GPU memory target if none is asked for.
        most_supervised: largest batch size for nnU-Net's own training.

    Raises:
        NnsslError: image-only or unusable data, naming case, file and remedy; no fingerprint of nnU-Net's yet; an option
            that nothing can be planned from.
    """

    backbone: ClassVar[str]
    preset: ClassVar[str]
    default_memory_gb: ClassVar[float]
    most_supervised: ClassVar[int] = MOST_CASES

    def __init__(
        self,
        dataset_name_or_id: str | int,
        gpu_memory_target_in_gb: float | None = None,
        preprocessor_name: str = "DefaultPreprocessor",
        plans_name: str | None = None,
        overwrite_target_spacing: Sequence[float] | None = None,
        suppress_transpose: bool = False,
    ) -> None:
        check_options(gpu_memory_target_in_gb, plans_name, overwrite_target_spacing)
        raw, preprocessed = folder("nnUNet_raw"), folder("nnUNet_preprocessed")
        name = str(maybe_convert_to_dataset_name(dataset_name_or_id))
        number = convert_dataset_name_to_id(name)
        require_labels(raw / name, number)
        fingerprint = preprocessed / name / "dataset_fingerprint.json"
        if not fingerprint.is_file():  # nnU-Net's planner insists on it, and a stock training copies it
            raise NnsslError(
                f"{name} has no fingerprint ({fingerprint})", f"run: nnUNetv2_extract_fingerprint -d {number}"
            )
        super().__init__(
            dataset_name_or_id,
            self.default_memory_gb if gpu_memory_target_in_gb is None else gpu_memory_target_in_gb,
            preprocessor_name,
            plans_name or f"nnssl{self.preset}Plans",
            overwrite_target_spacing,
            suppress_transpose,
        )
        self.overrides = Overrides()
        self.views = Views()
        self.preprocessed = preprocessed / name
        self.channel_names = list((self.dataset_json.get("channel_names") or self.dataset_json["modality"]).values())
        for case, files in self.dataset.items():
            if len(files["images"]) != len(self.channel_names):
                raise NnsslError(
                    f"case {case} has {len(files['images'])} channel files, dataset.json names {len(self.channel_names)}",
                    "complete the case or correct channel_names in dataset.json",
                )
        self.reader = self.determine_reader_writer()
        # labels would bias intensities to what happens to be labelled; pretraining sees whole bodies
        self.dataset_fingerprint = label_free_fingerprint(
            {case: files["images"] for case, files in self.dataset.items()},
            self.reader,
            self.preprocessed,
            default_num_processes,
        )

    def generate_data_identifier(self, configuration_name: str) -> str:
        """Our own folder per plans: preprocessing deletes the folder it writes to, and stock planners share one."""
        return f"{self.plans_identifier}_{configuration_name}"

    def determine_normalization_scheme_and_whether_mask_is_used_for_norm(self) -> tuple[list[str], list[bool]]:
        """nnU-Net's rule for the mask; the scheme of each channel from `choose_normalization`."""
        cropped = self.dataset_fingerprint["median_relative_size_after_cropping"] < 3 / 4
        schemes = [scheme for scheme, _ in self.normalization()]
        leaves_zero = ("ZScoreNormalization", "nnsslPercentileNormalization")
        return schemes, [cropped and scheme in leaves_zero for scheme in schemes]

    def normalization(self) -> list[tuple[str, str]]:
        """Class name and reason per channel."""
        cases = self.dataset_fingerprint["cases"].values()
        return [
            choose_normalization(channel, [case["channels"][index]["tail_reach"] for case in cases])
            for index, channel in enumerate(self.channel_names)
        ]

    def plan_experiment(self) -> dict[str, Any]:
        """The plans, saved in the preprocessed folder.

        Raises:
            NnsslError: 2D data.
        """
        plans = self.make_plans()
        self.preprocessed.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(self.raw_dataset_folder) / "dataset.json", self.preprocessed / "dataset.json")
        earlier = self.preprocessed / f"{self.plans_identifier}.json"
        if earlier.is_file() and (finetuning := read_json(earlier).get(FINETUNING)) is not None:
            plans[FINETUNING] = finetuning
            print(f"kept {FINETUNING}, the fine-tuning settings of the {self.plans_identifier} that these replace")
        self.plans = plans
        self.save_plans(plans)
        print(describe(plans, "3d_fullres", len(self.dataset_json["labels"])))
        return plans

    def make_plans(self) -> dict[str, Any]:
        """The plans, written nowhere."""
        forward, backward = self.determine_transpose()
        target = self.determine_fullres_target_spacing()
        fingerprint = self.dataset_fingerprint
        shapes = [
            compute_new_shape(shape, spacing, target)
            for shape, spacing in zip(fingerprint["shapes_after_crop"], fingerprint["spacings"], strict=True)
        ]
        median_shape = np.median(shapes, 0)[forward]
        if median_shape[0] == 1:
            raise NnsslError(f"{self.dataset_name} is 2D; our planners plan 3D pretraining only", "use 3D images")
        configuration = self.get_plans_for_configuration(
            target[forward],
            median_shape,
            self.generate_data_identifier("3d_fullres"),
            float(np.prod(median_shape) * len(self.dataset)),
            {},
        )
        configuration["batch_dice"] = False  # nnU-Net sets it only where a 3d_lowres configuration exists
        return {
            "dataset_name": self.dataset_name,
            "plans_name": self.plans_identifier,
            "original_median_spacing_after_transp": np.median(fingerprint["spacings"], 0)[forward].tolist(),
            "original_median_shape_after_transp": np.median(fingerprint["shapes_after_crop"], 0)[forward]
            .round()
            .astype(int)
            .tolist(),
            "image_reader_writer": self.reader.__name__,
            "transpose_forward": [int(axis) for axis in forward],
            "transpose_backward": [int(axis) for axis in backward],
            "configurations": {"3d_fullres": configuration},
            "experiment_planner_used": type(self).__name__,
            "label_manager": "LabelManager",
            "foreground_intensity_properties_per_channel": self.intensities(),
        }

    def intensities(self) -> dict[str, dict[str, float]]:
        """What nnU-Net's CTNormalization reads per channel: the fingerprint's, or the window asked for.

        nnU-Net clips to the percentiles 0.5 and 99.5, subtracts the mean and divides by the standard deviation. A window
        takes the place of all four, so that it becomes the range from -2 to 2 (our choice).

        Raises:
            NnsslError: a window without or of endless width, or no channel named CT to apply it to.
        """
        found: dict[str, dict[str, float]] = self.dataset_fingerprint["foreground_intensity_properties_per_channel"]
        if self.overrides.window is None:
            return found
        low, high = self.overrides.window
        tomograms = [str(i) for i, (scheme, _) in enumerate(self.normalization()) if scheme == "CTNormalization"]
        if not -math.inf < low < high < math.inf or not tomograms:
            raise NnsslError(
                f"--window {low:g} to {high:g} HU for channels {', '.join(self.channel_names)}",
                "give two numbers, the lower first, and name CT channels CT in dataset.json (nnssl_convert --channels CT)",
            )
        window = {"percentile_00_5": low, "percentile_99_5": high, "mean": (low + high) / 2, "std": (high - low) / 4}
        return {key: {**values, **window} if key in tomograms else values for key, values in found.items()}

    def own_configuration(
        self, spacing: list[float], median: list[float], data_identifier: str, architecture: dict[str, Any], patch: Size
    ) -> dict[str, Any]:
        """A configuration as nnU-Net's planner writes it, for a network of ours; without batch size and ``nnssl`` block.

        Args:
            spacing: target mm.
            median: voxels of the median case at that spacing.
        """
        data_fn, data_kwargs, seg_fn, seg_kwargs = self.determine_resampling()
        softmax_fn, softmax_kwargs = self.determine_segmentation_softmax_export_fn()
        schemes, masks = self.determine_normalization_scheme_and_whether_mask_is_used_for_norm()
        return {
            "data_identifier": data_identifier,
            "preprocessor_name": self.preprocessor_name,
            "patch_size": list(patch),
            "median_image_size_in_voxels": median,
            "spacing": spacing,
            "normalization_schemes": schemes,
            "use_mask_for_norm": masks,
            "resampling_fn_data": data_fn.__name__,
            "resampling_fn_seg": seg_fn.__name__,
            "resampling_fn_data_kwargs": data_kwargs,
            "resampling_fn_seg_kwargs": seg_kwargs,
            "resampling_fn_probabilities": softmax_fn.__name__,
            "resampling_fn_probabilities_kwargs": softmax_kwargs,
            "architecture": architecture,
        }

    def step_gb(self, architecture: dict[str, Any], patch: Size, divisor: Size) -> Callable[[int], float]:
        """What a step of pretraining takes in GB, by cases per step."""
        channels, classes = len(self.channel_names), len(self.dataset_json["labels"])
        whole, part = (
            network_cost(architecture, size, channels, classes) for size in (patch, local_crop(patch, divisor))
        )
        return lambda batch: memory_gb(whole, batch, local=part, views=self.views)

    def fitting_batch(self, gb: Callable[[int], float]) -> int:
        """The largest number of cases per step that fits the target memory."""
        return largest_batch(lambda batch: gb(batch) <= float(self.UNet_vram_target_GB), MOST_CASES)

    def nnssl_block(
        self, configuration: dict[str, Any], divisor: Size, token: Size | None, reasons: dict[str, str]
    ) -> dict[str, Any]:
        """The block that pretraining reads (`nnssl_ext.plans`), from a configuration that is complete otherwise."""
        z, y, x = (int(edge) for edge in configuration["patch_size"])
        patch = (z, y, x)
        estimate = self.step_gb(configuration["architecture"], patch, divisor)
        target = float(self.UNet_vram_target_GB)
        batch = self.overrides.batch_size or self.fitting_batch(estimate)
        views = f"{self.views.global_views} global and {self.views.local_views} local views per case"
        return {
            "schema": 1,
            "backbone": self.backbone,
            "preset": self.preset,
            "token_size": list(token) if token else None,
            "global_crop": list(patch),
            "local_crop": list(local_crop(patch, divisor)),
            "batch_size": batch,
            "memory_gb": {"target": target, "estimate": round(estimate(batch), 2)},
            "reasons": {
                "spacing": self._spacing_reason(),
                **reasons,
                "local_crop": f"half the global crop, in multiples of {list(divisor)} voxels",
                "batch_size": "asked for"
                if self.overrides.batch_size
                else f"the largest up to {MOST_CASES} that fits {target:g} GB with {views}, all voxels encoded; at least 2",
                **({"window": "asked for"} if self.overrides.window else {}),
                **{
                    f"normalization of channel {index} ({channel})": reason
                    for index, (channel, (_, reason)) in enumerate(
                        zip(self.channel_names, self.normalization(), strict=True)
                    )
                },
            },
        }

    def supervised_batch(self, fits_batch: int, patch: Size, voxels: float) -> int:
        """The batch size asked for, or nnU-Net's: what fits, at most 5 % of the data set's voxels and `most_supervised`, at
        least 2."""
        if self.overrides.batch_size:
            return self.overrides.batch_size
        share = round(voxels * 0.05 / float(np.prod(patch)))
        return max(min(fits_batch, share, self.most_supervised), self.UNet_min_batch_size)

    def _spacing_reason(self) -> str:
        if self.overwrite_target_spacing is not None:
            return "asked for"
        return "nnU-Net's rule: median of the cases; 10th percentile along a much coarser axis"
