"""DICOM series: finding them in folders, and making sure that the slices are those of one volume."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnssl_ext.dataset_conversion.cases import image_ending
from nnssl_ext.errors import NnsslError

POSITION, ORIENTATION, PIXEL_SPACING, MODALITY = "0020|0032", "0020|0037", "0028|0030", "0008|0060"
SLOPE, INTERCEPT = "0028|1053", "0028|1052"
ENDINGS = (".dcm", ".dicom", ".ima")
UNEVEN = 0.1  # of the usual distance between slices: rounded positions differ by less, a missing slice by 1


@dataclass(frozen=True)
class Series:
    """The slices of the only series in a folder, sorted by position, and its modality (CT, MR, PT, ...)."""

    folder: Path
    files: tuple[Path, ...]
    modality: str


def find_series(files: Sequence[Path]) -> tuple[list[Series], list[NnsslError]]:
    """One series per folder of the DICOM files among these, and a problem for every folder that mixes or hides some."""
    series, problems = [], []
    slices: dict[Path, list[Path]] = {}
    for path in files:
        try:
            if _is_dicom(path):
                slices.setdefault(path.parent, []).append(path)
        except FileNotFoundError:
            continue  # a broken link: beside DICOM files it is told below, elsewhere it need not be one
        except OSError as error:
            problems.append(NnsslError(f"{path}: unreadable: {error.strerror}", "make it readable, or move it away"))
    for folder, seen in sorted(slices.items()):
        try:
            series.append(_only_series(folder, seen))
        except NnsslError as problem:
            problems.append(problem)
    return series, problems


def check_slices(files: tuple[Path, ...]) -> int:
    """That sorted slices are parallel, of one size, evenly apart and stacked along their normal.

    Returns:
        SimpleITK's pixel type to read them in. By default it is that of the first slice, which truncates others where
        they are rescaled differently (PET), so those are read as float32.

    Raises:
        NnsslError: mixed series, missing slices, doubled slices or a tilted gantry, naming folder and slices.
    """
    folder = files[0].parent
    headers = [_header(path) for path in files]
    for key in (POSITION, ORIENTATION):
        without = [path.name for path, header in zip(files, headers, strict=True) if key not in header]
        if without:
            raise NnsslError(f"{folder}: no slice position in {without[0]}", "export the series with its geometry")
    orientation = np.stack([np.array(_numbers(header[ORIENTATION])) for header in headers])
    sizes = {(header["size"], header.get(PIXEL_SPACING, "")) for header in headers}
    if np.abs(orientation - orientation[0]).max() > 1e-3 or len(sizes) > 1:
        raise NnsslError(
            f"{folder}: mixed series: slices differ in orientation, size or pixel spacing",
            "put each series into its own folder",
        )
    positions = np.array([_numbers(header[POSITION]) for header in headers])
    along_row, along_column = np.split(orientation[0], 2)
    normal = np.cross(along_row, along_column)
    heights = positions @ normal
    order = np.argsort(heights)
    same = np.flatnonzero(np.diff(heights[order]) < 1e-3)
    if same.size:
        one, other = files[order[same[0]]], files[order[same[0] + 1]]
        raise NnsslError(
            f"{folder}: mixed series: {one.name} and {other.name} lie at the same position",
            "put each series (phase, echo, reconstruction) into its own folder",
        )
    steps = np.abs(np.diff(heights))
    usual = float(np.median(steps))
    odd = int(np.argmax(np.abs(steps - usual)))
    if abs(steps[odd] - usual) > UNEVEN * usual:
        raise NnsslError(
            f"{folder}: missing slices: {steps[odd]:.4g} mm between {files[odd].name} and {files[odd + 1].name}, "
            f"elsewhere {usual:.4g} mm",
            "fetch the missing slices, or leave the series out",
        )
    aside = positions - positions[0] - np.outer(heights - heights[0], normal)
    pixel = min(_numbers(headers[0].get(PIXEL_SPACING, "1\\1")))
    if np.abs(aside).max() > 0.5 * pixel:
        raise NnsslError(
            f"{folder}: direction is not orthonormal: slices are shifted against each other (gantry tilt)",
            "resample the series onto an orthogonal grid, e.g. with dcm2niix",
        )
    rescaled = {(float(header.get(SLOPE, 1)), float(header.get(INTERCEPT, 0))) for header in headers}
    return sitk.sitkFloat32 if len(rescaled) > 1 else sitk.sitkUnknown


def _only_series(folder: Path, seen: Sequence[Path]) -> Series:
    broken = sorted(path.name for path in folder.iterdir() if not os.path.exists(path))
    if broken:  # GDCM would not list the files behind one
        raise NnsslError(
            f"{folder}: {len(broken)} link(s) to missing files beside {len(seen)} DICOM file(s), e.g. {broken[0]}",
            "fetch the files (git annex get, datalad get), or leave the series out",
        )
    identifiers = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
    if len(identifiers) > 1:
        raise NnsslError(
            f"{folder}: mixed series: {len(identifiers)} DICOM series in one folder",
            "put each series into its own folder",
        )
    files: tuple[str, ...] = ()
    if identifiers:
        files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), identifiers[0])
    lost = sorted({path.name for path in seen} - {Path(file).name for file in files})
    if lost:
        raise NnsslError(
            f"{folder}: unreadable: {len(lost)} of {len(seen)} DICOM files, e.g. {lost[0]}",
            "copy or export the series again, or leave it out",
        )
    return Series(folder, tuple(Path(file) for file in files), _header(Path(files[0])).get(MODALITY, "").strip())


def _is_dicom(path: Path) -> bool:
    """By its ending or, as scanners name files IM0001 or by their unique identifier, by its first bytes.

    Raises:
        OSError: it had to be opened and could not.
    """
    if path.name.upper() == "DICOMDIR" or image_ending(path):
        return False
    if path.suffix and not path.suffix[1:].isdigit():
        return path.suffix.lower() in ENDINGS
    with open(path, "rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def _header(path: Path) -> dict[str, str]:
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise NnsslError(
            f"{path}: unreadable DICOM file", "copy or export the series again, or leave it out"
        ) from error
    known = set(reader.GetMetaDataKeys())
    wanted = (POSITION, ORIENTATION, PIXEL_SPACING, MODALITY, SLOPE, INTERCEPT)
    header = {key: reader.GetMetaData(key) for key in wanted if key in known}
    return header | {"size": "x".join(map(str, reader.GetSize()))}


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split("\\")]
