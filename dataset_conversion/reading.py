"""Reading the 3D image that a source of data names: a file, one volume of a 4D file, a DICOM series, or a part of these."""

from __future__ import annotations

import os
from pathlib import Path

import SimpleITK as sitk

from nnssl_ext.data.scans import as_3d, read_files
from nnssl_ext.dataset_conversion.cases import Crop, ImageSource
from nnssl_ext.dataset_conversion.dicom import check_slices
from nnssl_ext.errors import NnsslError


def read_volume(
    source: ImageSource, opened: dict[tuple[Path, ...], sitk.Image] | None = None, *, padding: float | None = None
) -> sitk.Image:
    """The 3D image of a source, checked for everything but its voxel values.

    Args:
        source: what to read.
        opened: 4D files that were read already; filled here, so that each is unpacked once per case.
        padding: value of the voxels of a crop that lie beyond the image, 0 for labels; None: the image's lowest.

    Raises:
        NnsslError: missing, unreadable or truncated file; 2D or 4D; other volumes than the source names; several values
            per voxel; non-orthonormal direction; spacing that is not positive. The message names the file, the reason
            and the remedy.
    """
    whole = opened.get(source.files) if opened else None
    if whole is None:
        whole = _read(source)
    if opened is not None and source.volume is not None:
        opened[source.files] = whole
    image = as_3d(_volume_of(whole, source), source.path)
    return image if source.crop is None else _cropped(image, source.crop, padding)


def _read(source: ImageSource) -> sitk.Image:
    if len(source.files) > 1 and all(map(os.path.isfile, source.files)):
        return read_files(source.files, check_slices(source.files))
    return read_files(source.files)


def _volume_of(image: sitk.Image, source: ImageSource) -> sitk.Image:
    held = image.GetSize()[3] if image.GetDimension() == 4 else 1
    if source.volumes and held != len(source.volumes):
        size, names = "x".join(map(str, image.GetSize())), ", ".join(source.volumes)
        raise NnsslError(
            f"{source.path}: {held} volume(s) along the fourth axis ({size} voxels), but {len(source.volumes)} channel "
            f"name(s): {names}",
            "name every volume, in order, with --channels or as 'modality' in dataset.json",
        )
    return image if source.volume is None else image[:, :, :, source.volume]


def _cropped(image: sitk.Image, crop: Crop, padding: float | None) -> sitk.Image:
    size = image.GetSize()
    lower, upper = crop.lower[::-1], crop.upper[::-1]  # x, y, z
    before = [max(0, -low) for low in lower]
    after = [max(0, high - length) for high, length in zip(upper, size, strict=True)]
    if any(before) or any(after):
        value = float(sitk.GetArrayViewFromImage(image).min()) if padding is None else padding
        image = sitk.ConstantPad(image, before, after, value)
    length = [high - low for low, high in zip(lower, upper, strict=True)]
    return sitk.RegionOfInterest(image, length, [low + pad for low, pad in zip(lower, before, strict=True)])
