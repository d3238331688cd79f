"""What a registration leaves on disk: warped scan and labels, the displacement as image and as ITK transform, measures.

The transform maps world points of the fixed scan to world points of the moving one, initial transform included, and lives on the
fixed file's own grid. All warping is done by SimpleITK with this very transform, so the files agree with each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch

from nnssl_ext.errors import NnsslError
from nnssl_ext.files import atomic_write, read_json, write_json
from nnssl_ext.registration.affine import inverse_of
from nnssl_ext.registration.images import Grid, grid_of, place, reference
from nnssl_ext.registration.measures import dice, hd95
from nnssl_ext.registration.pipeline import Registration
from nnssl_ext.registration.smoothness import smoothness
from nnssl_ext.reports.statistics import finite

MEASURES = "measures.json"
"""Written last, and removed first: where it is, the other files are those of its registration."""
OVERVIEW, WARPED_LABELS, INVERSE = "overview.png", "warped_labels.nii.gz", "displacement_inverse.nii.gz"
DISPLACEMENT, TRANSFORM, WARPED = "displacement.nii.gz", "transform.h5", "warped.nii.gz"
UNFINISHED = "unfinished.json"
"""There only while the other files are written, so that what a killed run leaves is known to be ours."""
WRITTEN = (MEASURES, OVERVIEW, WARPED_LABELS, INVERSE, DISPLACEMENT, TRANSFORM, WARPED, UNFINISHED)


def check_folder(output: Path) -> None:
    """Find out before any work whether a folder can be there.

    Raises:
        NnsslError: it, or a folder that it should lie in, is a file.
    """
    nearest = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise NnsslError(f"cannot write to {output}: {nearest} is a file", "choose another -o")


def check_output(output: Path, inputs: Iterable[Path] = ()) -> None:
    """Find out before any work whether `write_outputs` would replace anything but an earlier registration.

    Raises:
        NnsslError: one of `inputs` is where results go, or a file of a result's name is not known to be ours.
    """
    check_folder(output)
    targets = {(output / name).resolve(): output / name for name in WRITTEN}
    for path in inputs:
        if target := targets.get(path.resolve()):
            raise NnsslError(f"{path} would be replaced by the result {target}", "choose another -o")
    present = [output / name for name in WRITTEN if (output / name).exists()]
    if present and not _is_ours(output):
        raise NnsslError(
            f"{present[0]} is not known to come from a registration, and would be replaced",
            "choose another -o, or move the file away",
        )


def displacement_image(result: Registration) -> sitk.Image:
    """The whole displacement, initial transform included: mm in world order on the fixed file's grid, float32 vectors."""
    deformation = _resampled(_world_field(result, result.field.displacement_voxels), result.fixed.file_grid)
    both = sitk.CompositeTransform([result.initial, sitk.DisplacementFieldTransform(deformation)])
    return _field_of(both, result.fixed.file_grid)


def inverse_displacement_image(result: Registration) -> sitk.Image:
    """The displacement back, on the moving file's grid: ``fixed(y + v(y))`` looks like the moving scan.

    Raises:
        NnsslError: a given initial transform that cannot be inverted.
    """
    back = inverse_of(result.initial, "the initial transform")
    inverse = _world_field(result, result.field.inverse().displacement_voxels)
    grid = result.moving.file_grid
    deformation = sitk.GetArrayFromImage(_resampled(inverse, grid, back))
    total = sitk.GetArrayFromImage(_field_of(back, grid)).astype(np.float64) + deformation
    return grid.image(total.astype(np.float32))


def write_outputs(
    result: Registration,
    output: Path,
    request: dict[str, Any],
    inverse: bool = False,
    draw: Callable[[Path], object] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Write everything into a folder, in place of an earlier registration's files; returns the measures.

    Args:
        request: what was asked for, kept in the measures so that an interrupted batch knows what is done.
        inverse: also write the inverse field.
        draw: writes a picture into the file that it is given.
        more: further entries for the measures.

    Raises:
        NnsslError: the folder cannot be written, or see `check_output`.
    """
    check_output(output)
    write_json(output / UNFINISHED, {"request": request})
    _remove(output, MEASURES, OVERVIEW, WARPED_LABELS, INVERSE)
    displacement = displacement_image(result)
    transform = sitk.DisplacementFieldTransform(sitk.Cast(displacement, sitk.sitkVectorFloat64))
    _write_image(displacement, output / DISPLACEMENT)
    with atomic_write(output / TRANSFORM) as temporary:
        sitk.WriteTransform(transform, str(temporary))
    _write_image(warp_scan(result, transform), output / WARPED)
    if result.moving.labels is not None:
        warped = warp_labels(result.moving.labels, transform, result.fixed.file_grid)
        _write_image(warped, output / WARPED_LABELS)
    if inverse:
        _write_image(inverse_displacement_image(result), output / INVERSE)
    if draw is not None:
        draw(output / OVERVIEW)
    measures = {**measure(result, transform), **more, "request": request}
    write_json(output / MEASURES, measures)
    _remove(output, UNFINISHED)
    return measures


def warp_scan(result: Registration, transform: sitk.Transform) -> sitk.Image:
    """The moving scan on the fixed file's grid, linear; its lowest value where it saw nothing."""
    image, lowest = result.moving.image, float(result.moving.voxels.min())
    return sitk.Resample(
        image, reference(result.fixed.file_grid), transform, sitk.sitkLinear, lowest, image.GetPixelID()
    )


def warp_labels(labels: sitk.Image, transform: sitk.Transform, grid: Grid) -> sitk.Image:
    """The moving labels on a grid, nearest neighbour; 0 where there are none."""
    return sitk.Resample(labels, reference(grid), transform, sitk.sitkNearestNeighbor, 0, labels.GetPixelID())


def measure(result: Registration, transform: sitk.Transform, ignore: int | None = None) -> dict[str, Any]:
    """Figures of one registration, in JSON types. Smoothness is that of the deformation, on the common grid.

    Args:
        ignore: label of voxels that nothing is known about.
    """
    field = result.field
    length = field.displacement_mm.norm(dim=0).cpu().numpy()[result.fixed_mask]
    mask = torch.from_numpy(result.fixed_mask).to(field.displacement_voxels.device)
    found: dict[str, Any] = {
        "version": version("nnssl-ext"),
        "fixed": str(result.fixed),
        "moving": str(result.moving),
        "common_grid": str(result.grid),
        "start": result.initial_note,
        "regularisation": field.regularisation,
        "displacement_mm": {
            "mean": float(length.mean()),
            "p95": float(np.percentile(length, 95)),
            "max": float(length.max()),
        },
        "smoothness_foreground": asdict(smoothness(field.displacement_voxels, mask)),
        "smoothness_grid": asdict(smoothness(field.displacement_voxels)),
        "seconds": _rounded(result.seconds),
        "peak_memory_gib": _rounded(result.memory_gib),
        "notes": list(result.notes),
    }
    fixed, moving = result.fixed.labels, result.moving.labels
    if fixed is not None and moving is not None:
        found["labels_before"] = _overlap(fixed, moving, result.initial, ignore)
        found["labels_after"] = _overlap(fixed, moving, transform, ignore)
    return found


def _overlap(
    fixed: sitk.Image, moving: sitk.Image, transform: sitk.Transform, ignore: int | None = None
) -> dict[str, Any]:
    """Dice and HD95 of every label that one of the scans has, on the fixed scan's grid; None for what is not defined.

    Where both scans have a label and the warped labels do not, its HD95 is the diagonal of the fixed scan's grid, in mm:
    losing a label must not be better than misplacing it. What either volume says to `ignore` is background in both.
    """
    grid = grid_of(fixed)
    warped = sitk.GetArrayFromImage(warp_labels(moving, transform, grid)).astype(np.int64)
    target = sitk.GetArrayFromImage(fixed).astype(np.int64)
    if ignore is not None:
        unknown = (target == ignore) | (warped == ignore)
        target[unknown] = warped[unknown] = 0
    here, there = (set(np.unique(array).tolist()) for array in (target, sitk.GetArrayViewFromImage(moving)))
    labels = [int(value) for value in sorted((here | there) - {0, ignore})]
    diagonal = float(np.linalg.norm(np.multiply(grid.size, grid.spacing)))
    lost = (here & there).difference(np.unique(warped).tolist())
    distances = hd95(target, warped, grid.spacing, labels)
    scores = {
        "dice": dice(target, warped, labels),
        "hd95_mm": {label: diagonal if label in lost else value for label, value in distances.items()},
    }
    return {
        name: {
            "mean": _mean(list(each.values())),
            "per_label": {str(label): finite(value) for label, value in each.items()},
        }
        for name, each in scores.items()
    }


def _world_field(result: Registration, displacement_voxels: torch.Tensor) -> sitk.Image:
    """A deformation on the common grid as vectors of mm in world order."""
    return result.grid.image(result.grid.to_world(displacement_voxels.cpu().numpy().astype(np.float64)))


def _resampled(field: sitk.Image, grid: Grid, transform: sitk.Transform | None = None) -> sitk.Image:
    """A vector image on another grid, linear, its border repeated beyond it."""
    return grid.image(np.asarray(place(field, grid, transform)))


def _field_of(transform: sitk.Transform, grid: Grid) -> sitk.Image:
    """A transform as displacements on a grid, float32."""
    size, spacing = grid.size[::-1], grid.spacing[::-1]
    return sitk.TransformToDisplacementField(
        transform, sitk.sitkVectorFloat32, size, grid.origin, spacing, grid.direction
    )


def _is_ours(output: Path) -> bool:
    for name in (MEASURES, UNFINISHED):
        with suppress(NnsslError):
            found = read_json(output / name)
            if isinstance(found, dict) and "request" in found:
                return True
    return False


def _remove(output: Path, *names: str) -> None:
    for name in names:
        try:
            (output / name).unlink(missing_ok=True)
        except OSError as error:
            raise NnsslError(f"cannot replace {output / name}: {error}", f"make {output} writable") from error


def _write_image(image: sitk.Image, path: Path) -> None:
    with atomic_write(path) as temporary:
        sitk.WriteImage(image, str(temporary), useCompression=True)


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in values.items()}


def _mean(values: list[float]) -> float | None:
    known = [value for value in values if np.isfinite(value)]
    return float(np.mean(known)) if known else None
