"""One case from planned to checked, and written where there is a place for it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK as sitk

from nnssl_ext.data.foreground import foreground_mask
from nnssl_ext.data.scans import check_nifti, label_values, on_grid_of, voxels
from nnssl_ext.dataset_conversion.cases import ImageSource, Labels, PlannedCase
from nnssl_ext.dataset_conversion.reading import read_volume
from nnssl_ext.dataset_conversion.whole_folder import cannot_write
from nnssl_ext.errors import NnsslError

ENDING = ".nii.gz"
MOST_LABELS = 1024  # more values than this in unnamed labels: an image was taken for a label


class CannotWrite(NnsslError):
    """The target cannot be written: no matter of one case, so the conversion ends."""


@dataclass(frozen=True)
class CheckedCase:
    """One case after reading it, and writing it unless this was a dry run.

    Attributes:
        identifier: the case.
        shape: voxels along z, y, x.
        spacing: mm along z, y, x.
        values: label values that occur.
        share: part of the voxels that is labelled or foreground.
        how: per image and label, "copied" byte for byte or "written".
        notes: from the plan, and what was rounded.
        problem: what is wrong with it; the other fields are then empty.
    """

    identifier: str
    shape: tuple[int, int, int] | None = None
    spacing: tuple[float, float, float] | None = None
    values: tuple[int, ...] = ()
    share: float = 0.0
    how: str = ""
    notes: str = ""
    problem: NnsslError | None = None


@dataclass(frozen=True)
class Places:
    """Where a case's files go; None: nowhere, it is only checked."""

    images: Path | None = None
    labels: Path | None = None
    ending: str = ENDING


def checked(case: PlannedCase, labels: Labels | None, places: Places) -> CheckedCase:
    """Read, check and write one case; what is wrong with it comes back as its problem, and nothing stays written.

    Raises:
        CannotWrite: a place cannot be written.
    """
    sitk.ProcessObject_SetGlobalWarningDisplay(False)
    images = [places.images and places.images / f"{case.identifier}_{c:04d}{ENDING}" for c in range(len(case.channels))]
    label = places.labels and places.labels / f"{case.identifier}{places.ending}"
    try:
        return _converted(case, labels, images, label)
    except CannotWrite:
        raise
    except NnsslError as problem:
        for written in filter(None, (*images, label)):
            written.unlink(missing_ok=True)
        return CheckedCase(case.identifier, problem=NnsslError(f"case {case.identifier}: {problem.what}", problem.fix))


def write_image(image: sitk.Image, target: Path) -> None:
    """Write an image, compressed, and make sure it is whole.

    Raises:
        CannotWrite: the disk is full, or the folder not writable.
    """
    try:
        sitk.WriteImage(image, str(target), True)
        if target.name.endswith((".nii", ".nii.gz")):
            check_nifti(target)
        _sync(target)
    except (RuntimeError, OSError, NnsslError) as error:
        raise _fatal(target, error) from error


def _converted(
    case: PlannedCase, labels: Labels | None, images: Sequence[Path | None], target: Path | None
) -> CheckedCase:
    opened: dict[tuple[Path, ...], sitk.Image] = {}
    first = read_volume(case.channels[0], opened)
    array = voxels(first, case.channels[0].path)
    how, notes = [], [case.notes] if case.notes else []
    for channel, source in enumerate(case.channels):
        image, rounded = first, False
        if channel:
            image, rounded = on_grid_of(read_volume(source, opened), source.path, first, case.channels[0].path)
            voxels(image, source.path)
        how.append(_put(image, source, rounded, images[channel]))
        notes += ["header rounded to channel 0's"] * rounded
    if case.label is None:
        values, share = _put_foreground(first, array, case.channels[0].path, target)
        how.append("foreground")
    else:
        label, rounded = on_grid_of(read_volume(case.label, padding=0.0), case.label.path, first, case.channels[0].path)
        values = label_values(label, case.label.path)
        _check_values(values, labels, case.label.path)
        share = float(np.count_nonzero(sitk.GetArrayViewFromImage(label))) / array.size
        how.append(_put(label, case.label, rounded, target))
        notes += ["label header rounded to the image's"] * rounded
    z, y, x = array.shape
    sx, sy, sz = first.GetSpacing()
    return CheckedCase(case.identifier, (z, y, x), (sz, sy, sx), values, share, "+".join(how), "; ".join(notes))


def _put(image: sitk.Image, source: ImageSource, rounded: bool, target: Path | None) -> str:
    """Copy the file if it is what nnU-Net wants, else write the image; says which."""
    whole = source.volume is None and source.crop is None and not rounded
    same = whole and source.path.name.endswith(ENDING) and _is_3d_on_disk(source.path)
    if target is not None and same:
        try:
            shutil.copyfile(source.path, target)
            _sync(target)
        except OSError as error:
            raise _fatal(target, error) from error
    elif target is not None:
        write_image(image, target)
    return "copied" if same else "written"


def _put_foreground(
    image: sitk.Image, array: np.ndarray, path: Path, target: Path | None
) -> tuple[tuple[int, ...], float]:
    try:
        mask = foreground_mask(array)
    except NnsslError as error:
        raise NnsslError(f"{path}: {error.what}", error.fix) from error
    if target is not None:
        label = sitk.GetImageFromArray(mask.astype(np.uint8))
        label.CopyInformation(image)
        write_image(label, target)
    return tuple(np.unique(mask).astype(int).tolist()), float(mask.mean())


def _check_values(values: tuple[int, ...], labels: Labels | None, path: Path) -> None:
    if labels is None:
        if values[0] < 0 or values[-1] > MOST_LABELS:
            raise NnsslError(
                f"{path}: unknown label values: {values[0]} to {values[-1]} where 0 to {MOST_LABELS} can be",
                "give the label, not the image; number labels 0, 1, 2, ...",
            )
        return
    known_values = {v for value in labels.values() for v in (value if isinstance(value, list) else [value])}
    unknown = sorted(set(values) - known_values)
    if unknown:
        known = ", ".join(f"{value} {name}" for name, value in labels.items())
        raise NnsslError(
            f"{path}: unknown label values {unknown}; known: {known}", "correct the label, or name the values"
        )


def _is_3d_on_disk(path: Path) -> bool:
    return len(nibabel.load(path).shape) == 3  # type: ignore[attr-defined]


def _fatal(target: Path, reason: Exception) -> CannotWrite:
    error = cannot_write(target, reason.what if isinstance(reason, NnsslError) else reason)
    return CannotWrite(error.what, error.fix)


def _sync(path: Path) -> None:
    with open(path, "rb") as written:
        os.fsync(written.fileno())
