"""Plans for another data set that follow a checkpoint instead of nnU-Net's own rules of thumb."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nnssl_ext.checkpoints.adaptation_plan import token_size
from nnssl_ext.checkpoints.pretrained import Pretrained
from nnssl_ext.errors import NnsslError
from nnssl_ext.paths import dataset_id, dataset_name, folder

CONFIGURATION, CT = "3d_fullres", "CTNormalization"


def derive_plans(
    source: Pretrained, dataset: str | int, plans_name: str, patch_size: Sequence[int] | None
) -> dict[str, Any]:
    """Plans with one configuration, ``3d_fullres``, for a data set whose fingerprint exists.

    From the checkpoint: architecture, normalisation, patch (its recommendation) and the spacing rule: a pretraining at a fixed
    spacing imposes it, one that followed its data lets nnU-Net choose the target's. From the target's fingerprint, by nnU-Net's
    own planner: everything else (axis order, reader, resampling, intensity statistics).

    Args:
        patch_size: voxels z, y, x instead of the recommendation; positions are then interpolated.

    Raises:
        NnsslError: no fingerprint, 2D data, a patch that the network cannot take, channels whose normalisation is unknown, or
            Hounsfield units that the checkpoint expects of a channel that is no CT.
    """
    name = dataset_name(dataset, "nnUNet_raw")
    fingerprint = folder("nnUNet_preprocessed") / name / "dataset_fingerprint.json"
    if not fingerprint.is_file():
        raise NnsslError(
            f"{name} has no fingerprint ({fingerprint})",
            f"nnUNetv2_extract_fingerprint -d {dataset_id(name)} --verify_dataset_integrity, or give existing plans with -p",
        )
    from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
    from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape

    planner = ExperimentPlanner(name, plans_name=plans_name)
    forward, backward = planner.determine_transpose()
    spacing = np.array(source.spacing or planner.determine_fullres_target_spacing()[forward])
    spacings, shapes = (np.array(planner.dataset_fingerprint[key]) for key in ("spacings", "shapes_after_crop"))
    median_shape = np.median(
        [compute_new_shape(n[forward], s[forward], spacing) for n, s in zip(shapes, spacings, strict=True)], axis=0
    )
    if len(spacing) != 3 or median_shape[0] == 1:
        raise NnsslError(f"{name} is 2D", "pretrained networks here are 3D; use 3D data")
    patch = [int(p) for p in patch_size or source.patch_size]
    architecture = fit_patch(source.architecture, patch, source.origin)
    own, masks = planner.determine_normalization_scheme_and_whether_mask_is_used_for_norm()
    configuration = {
        "data_identifier": f"{plans_name}_{CONFIGURATION}",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": source.batch_size,
        "patch_size": patch,
        "median_image_size_in_voxels": median_shape.tolist(),
        "spacing": spacing.tolist(),
        "normalization_schemes": _normalisation(source, own, name),
        "use_mask_for_norm": [bool(m) for m in masks],
        **_resampling(planner),
        "architecture": architecture,
        "batch_dice": False,
        "nnssl": _block(source, architecture, fixed_patch=patch_size is not None),
    }
    return {
        "dataset_name": name,
        "plans_name": plans_name,
        "original_median_spacing_after_transp": np.median(spacings, axis=0)[forward].tolist(),
        "original_median_shape_after_transp": np.median(shapes, axis=0)[forward].round().astype(int).tolist(),
        "image_reader_writer": planner.determine_reader_writer().__name__,
        "transpose_forward": [int(axis) for axis in forward],
        "transpose_backward": [int(axis) for axis in backward],
        "configurations": {CONFIGURATION: configuration},
        "experiment_planner_used": "nnssl_adapt",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": planner.dataset_fingerprint[
            "foreground_intensity_properties_per_channel"
        ],
    }


def fit_patch(architecture: dict[str, Any], patch: Sequence[int], origin: str) -> dict[str, Any]:
    """The architecture for inputs of `patch` voxels.

    Raises:
        NnsslError: the network's tokens or strides do not divide the patch, or leave one place of it.
    """
    kwargs = architecture["arch_kwargs"]
    divisor = token_size(kwargs)
    if any(p % d or p < d for p, d in zip(patch, divisor, strict=True)):
        raise NnsslError(
            f"a patch of {'x'.join(map(str, patch))} voxels does not suit the network in {origin}",
            f"give --patch_size with multiples of {'x'.join(map(str, divisor))}",
        )
    if "input_shape" not in kwargs:
        if tuple(patch) == tuple(divisor):
            raise NnsslError(
                f"a patch of {'x'.join(map(str, patch))} voxels is a single place of the deepest feature map of {origin}, which cannot "
                "be normalised",
                f"give --patch_size with an edge of at least twice that of {'x'.join(map(str, divisor))}",
            )
        return architecture
    return {**architecture, "arch_kwargs": {**kwargs, "input_shape": list(patch)}}


def _block(source: Pretrained, architecture: dict[str, Any], fixed_patch: bool) -> dict[str, Any]:
    """Our part of the plans (see `nnssl_ext.plans`): what the network is and why the numbers are what they are."""
    network = architecture["network_class_name"].rsplit(".", 1)[-1]
    backbone = {"SegmentationPrimus": "primus", "SegmentationSwinUNETR": "swin"}.get(network, "resenc")
    return {
        "schema": 1,
        "backbone": backbone,
        "preset": source.preset,
        "token_size": list(token_size(architecture["arch_kwargs"])) if backbone == "primus" else None,
        "reasons": {
            "architecture": f"that of {source.origin}",
            "patch_size": "given by the user" if fixed_patch else f"recommended by {source.origin}",
            "spacing": f"the pretraining's fixed {list(source.spacing)} mm"
            if source.spacing
            else "nnU-Net's choice for this data set, as the pretraining's followed its data",
            "normalization_schemes": "those of the pretraining",
        },
    }


def _normalisation(source: Pretrained, own: Sequence[str], dataset: str) -> list[str]:
    """The checkpoint's scheme per channel; one scheme for all serves any number of channels.

    Args:
        own: nnU-Net's schemes for the channels of the data set, by their names.
    """
    found = list(source.normalization_schemes)
    if len(found) != len(own):
        if len(set(found)) > 1:
            raise NnsslError(
                f"{source.origin} normalises its channels differently ({', '.join(found)}), and {dataset} has {len(own)}",
                "plan the target with the checkpoint's planner and give these plans with -p",
            )
        found = found[:1] * len(own)
    for channel, (scheme, usual) in enumerate(zip(found, own, strict=True)):
        # nnU-Net's scheme for CT clips and scales by the intensities of all scans, which mean something else in each without units
        if scheme == CT and usual != CT:
            raise NnsslError(
                f"{source.origin} was pretrained on CT in Hounsfield units, and channel {channel} of {dataset} is not called CT",
                "if it is one, call it CT in dataset.json and extract the fingerprint again; else plan with the checkpoint's planner, "
                "which normalises by scan, and give these plans with -p",
            )
    return found


def _resampling(planner: Any) -> dict[str, Any]:
    """nnU-Net's choice of resampling functions, as plans write it."""
    data, data_kwargs, seg, seg_kwargs = planner.determine_resampling()
    probabilities, probabilities_kwargs = planner.determine_segmentation_softmax_export_fn()
    return {
        "resampling_fn_data": data.__name__,
        "resampling_fn_data_kwargs": data_kwargs,
        "resampling_fn_seg": seg.__name__,
        "resampling_fn_seg_kwargs": seg_kwargs,
        "resampling_fn_probabilities": probabilities.__name__,
        "resampling_fn_probabilities_kwargs": probabilities_kwargs,
    }
