"""Reading one 3D scan exactly, or saying what is wrong with the file.

SimpleITK is what nnU-Net reads with, so what it refuses is refused here. What it does not notice in NIfTI files is looked
for in their bytes (measured with 2.5): a truncated file reads as zeros, NaN and infinite voxels read as zeros, and
writing to a full disk is no error.
"""

from __future__ import annotations

import gzip
import io
import os
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK as sitk

from nnssl_ext.errors import NnsslError

AGAIN = "copy, download or export the file again, or leave it out"
SHEAR = 1e-3  # what ITK's NIfTI reader tolerates, applied to every format
SAME_GRID = 0.05  # voxels: rounded headers of one grid differ by less, misplaced labels by more
_SPLIT = "split it into one 3D file per volume (channels as case_0000, case_0001; time points as cases of their own)"


def read_scan(path: Path) -> sitk.Image:
    """The 3D image in a file, checked for everything but its voxel values.

    Raises:
        NnsslError: as `read_files` and `as_3d`.
    """
    return as_3d(read_files([path]), path)


def read_files(files: Sequence[Path], pixel_type: int = sitk.sitkUnknown) -> sitk.Image:
    """The image in a file, or in the slices of a DICOM series in order.

    Args:
        files: one file, or the slices.
        pixel_type: SimpleITK's, to convert to; by default as stored (of a series, as in its first slice).

    Raises:
        NnsslError: missing, unreadable or truncated file, a voxel size that is zero or not finite, naming the file, the
            reason and the remedy.
    """
    path = files[0] if len(files) == 1 else files[0].parent
    missing = [f for f in files if not os.path.isfile(f)]
    if missing:
        linked = os.path.islink(missing[0])
        raise NnsslError(
            f"{missing[0]}: no such file{' behind this link' if linked else ''}",
            ("fetch it (git annex get, datalad get), " if linked else "")
            + "check the path, restore the file, or take the case out of the listing",
        )
    ending = re.search(r"\.(nii(\.gz)?|mh[ad])$", path.name, re.IGNORECASE)
    if ending and ending[0] != ending[0].lower() and ending[0] not in (".NII", ".NII.GZ"):  # as ITK's readers have it
        raise NnsslError(f"{path}: ending {ending[0]} is not read", f"rename it to end in {ending[0].lower()}")
    if path.name.lower().endswith((".nii", ".nii.gz")):
        check_nifti(path)
    try:
        return sitk.ReadImage([str(f) for f in files] if len(files) > 1 else str(path), pixel_type)
    except RuntimeError as error:
        if "orthonormal" in str(error):
            raise _not_orthonormal(path) from error
        raise NnsslError(f"{path}: unreadable: {_last_line(error)}", AGAIN) from error


def as_3d(image: sitk.Image, path: Path) -> sitk.Image:
    """The image without further axes of length 1, once sure that it is one 3D volume on an orthogonal grid.

    Raises:
        NnsslError: 2D or 4D; several or complex values per voxel; non-orthonormal direction; spacing not positive.
    """
    while image.GetDimension() > 3 and image.GetSize()[-1] == 1:
        image = image[(slice(None),) * (image.GetDimension() - 1) + (0,)]
    size = "x".join(map(str, image.GetSize()))
    if image.GetNumberOfComponentsPerPixel() > 1:
        raise NnsslError(f"{path}: {image.GetNumberOfComponentsPerPixel()} values per voxel where 1 is needed", _SPLIT)
    if image.GetPixelID() in (sitk.sitkComplexFloat32, sitk.sitkComplexFloat64):
        raise NnsslError(
            f"{path}: complex values where real ones are needed", "convert it to magnitude, or leave the file out"
        )
    if image.GetDimension() > 3:
        raise NnsslError(f"{path}: {image.GetDimension()}D ({size} voxels) where 3D is needed", _SPLIT)
    if image.GetDimension() < 3 or min(image.GetSize()) < 2:
        raise NnsslError(
            f"{path}: 2D ({size} voxels) where 3D is needed", "stack the slices into one volume, or leave the file out"
        )
    direction = np.array(image.GetDirection()).reshape(3, 3)
    if np.abs(direction.T @ direction - np.eye(3)).max() > SHEAR:
        raise _not_orthonormal(path)
    if not all(np.isfinite(s) and s > 0 for s in image.GetSpacing()):
        raise NnsslError(f"{path}: spacing {image.GetSpacing()} mm is not positive", "correct the header")
    return image


def voxels(image: sitk.Image, path: Path) -> np.ndarray:
    """``(Z, Y, X)`` voxels of an image with something in it: a view, so keep the image alive while it is used.

    Raises:
        NnsslError: NaN or infinite voxels, or all voxels equal.
    """
    array = sitk.GetArrayViewFromImage(image)
    if array.dtype.kind in "fc":
        wrong = int(array.size - np.isfinite(array).sum())
        if wrong:
            raise _not_finite(path, wrong, array.size)
    if array.min() == array.max():
        raise NnsslError(
            f"{path}: constant image, all voxels equal {array.flat[0]}", "export it again, or leave it out"
        )
    return array


def label_values(image: sitk.Image, path: Path) -> tuple[int, ...]:
    """The values that occur in a label image, sorted.

    Raises:
        NnsslError: values that are not integers (fractions, NaN).
    """
    array = sitk.GetArrayViewFromImage(image)
    found = sorted(set().union(*(np.unique(plane).tolist() for plane in array)))
    odd = [v for v in found if not np.isfinite(v) or v != int(v)]
    if odd:
        raise NnsslError(
            f"{path}: labels are not integers (e.g. {odd[0]:.6g})",
            "resample labels with nearest neighbours, threshold probabilities, or give the right file",
        )
    return tuple(int(v) for v in found)


def on_grid_of(image: sitk.Image, path: Path, reference: sitk.Image, reference_path: Path) -> tuple[sitk.Image, bool]:
    """`image` on the very grid of `reference`, and whether its header had to be rounded to it.

    Raises:
        NnsslError: the shapes differ, or the affines by more than rounding.
    """
    if image.GetSize() != reference.GetSize():
        raise NnsslError(
            f"{path}: shape {_zyx(image)} differs from {_zyx(reference)} of {reference_path} (z, y, x voxels)",
            "resample it onto the image's grid, or pair the right files",
        )
    apart = _corners_apart(image, reference)
    if apart > SAME_GRID * min(reference.GetSpacing()):
        raise NnsslError(
            f"{path}: affine differs from that of {reference_path}: corners lie up to {apart:.3g} mm apart",
            "resample it onto the image's grid, or correct its header",
        )
    same = all(  # nnU-Net's integrity check, verbatim in its tolerances
        np.allclose(getattr(image, get)(), getattr(reference, get)())
        for get in ("GetSpacing", "GetOrigin", "GetDirection")
    )
    if not same:
        image.CopyInformation(reference)
    return image, not same


def check_nifti(path: Path) -> None:
    """That a NIfTI file holds all the voxels its header promises, only finite ones, and that these have a size.

    Raises:
        NnsslError: it does not, or it is no NIfTI file.
    """
    try:
        image: Any = nibabel.load(path)
        proxy = image.dataobj
        sizes = _voxel_sizes(path, image)
        expected = int(np.prod(proxy.shape)) * proxy.dtype.itemsize
        found, wrong = _scanned(path, int(proxy.offset), proxy.dtype)
    except nibabel.filebasedimages.ImageFileError as error:
        raise NnsslError(f"{path}: unreadable: no NIfTI file, or cut off in its header", AGAIN) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise NnsslError(f"{path}: truncated or damaged: {error}", AGAIN) from error
    except (OSError, ValueError) as error:
        raise NnsslError(f"{path}: unreadable: {_last_line(error)}", AGAIN) from error
    if not (np.isfinite(sizes) & (sizes > 0)).all():
        raise NnsslError(
            f"{path}: voxel size {'x'.join(f'{size:g}' for size in sizes)} mm (x, y, z) in the header",
            "correct pixdim in the header, or leave the file out",
        )
    if found < expected:
        raise NnsslError(f"{path}: truncated: {found} of {expected} bytes of voxels are there", AGAIN)
    if wrong:
        raise _not_finite(path, wrong, int(np.prod(proxy.shape)))


def _corners_apart(a: sitk.Image, b: sitk.Image) -> float:
    """mm between the corners of two images of one size, at most."""
    corners = [[(i >> axis & 1) * (n - 1) for axis, n in enumerate(a.GetSize())] for i in range(8)]
    points = [np.subtract(a.TransformIndexToPhysicalPoint(c), b.TransformIndexToPhysicalPoint(c)) for c in corners]
    return float(np.linalg.norm(points, axis=1).max())


def _scanned(path: Path, offset: int, dtype: np.dtype) -> tuple[int, int]:
    """Bytes of voxels in a NIfTI file, unpacked, and how many floating-point voxels are NaN or infinite."""
    found = wrong = 0
    with _unpacked(path) as stream:
        stream.read(offset)
        while block := stream.read(1 << 22):  # a multiple of every voxel size, and never short before the end
            found += len(block)
            if dtype.kind in "fc":
                whole = len(block) // dtype.itemsize
                wrong += whole - int(np.isfinite(np.frombuffer(block, dtype, whole)).sum())
    return found, wrong


def _voxel_sizes(path: Path, image: Any) -> np.ndarray:
    """mm along x, y, z as the header has them: nibabel (unless told not to check) and ITK turn 0 into 1."""
    with _unpacked(path) as stream:
        header = type(image.header).from_fileobj(stream, check=False)
    return np.abs(header["pixdim"][1 : 1 + min(3, len(image.shape))])  # a sign is legal


def _unpacked(path: Path) -> io.BufferedIOBase:
    return gzip.open(path) if path.name.lower().endswith(".gz") else open(path, "rb")


def _not_finite(path: Path, wrong: int, voxels: int) -> NnsslError:
    return NnsslError(
        f"{path}: {wrong} of {voxels} voxels are NaN or infinite",
        "replace them by a meaningful value (e.g. air), or leave the file out",
    )


def _not_orthonormal(path: Path) -> NnsslError:
    return NnsslError(
        f"{path}: direction is not orthonormal (sheared or degenerate grid)",
        "resample it onto an orthogonal grid, or correct its header",
    )


def _zyx(image: sitk.Image) -> str:
    return "x".join(map(str, image.GetSize()[::-1]))


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].removeprefix("sitk::ERROR: ").removeprefix("ITK ERROR: ")
