"""DICOM series: finding them in folders, and making sure that the slices are those of one volume."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnssl_ext.dataset_conversion.cases import image_ending
from nnssl_ext.errors import NnsslError

POSITION, ORIENTATION, PIXEL_SPACING, MODALITY = "0020|0032", "0020|0037", "0028|0030", "0008|0060"
UNEVEN = 0.1  # of the usual distance between slices: rounded positions differ by less, a missing slice by 1


@dataclass(frozen=True)
class Series:
    """The slices of the only series in a folder, sorted by position, and its modality (CT, MR, PT, ...)."""

    folder: Path
    files: tuple[Path, ...]
    modality: str


def find_series(root: Path) -> tuple[list[Series], list[NnsslError]]:
    """One series per folder at or below `root`, and a problem for every folder that mixes or hides some."""
    series, problems = [], []
    for folder in sorted({path.parent for path in _dicom_files(root)}):
        try:
            series.append(_only_series(folder))
        except NnsslError as problem:
            problems.append(problem)
    return series, problems


def check_slices(files: tuple[Path, ...]) -> None:
    """That sorted slices are parallel, of one size, evenly apart and stacked along their normal.

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


def _only_series(folder: Path) -> Series:
    seen = [path for path in _dicom_files(folder) if path.parent == folder]
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


def _dicom_files(root: Path) -> Iterator[Path]:
    for path in root.rglob("*"):
        if path.name.startswith(".") or path.name.upper() == "DICOMDIR" or image_ending(path) or not path.is_file():
            continue
        if path.suffix.lower() in (".dcm", ".ima"):
            yield path
        elif not path.suffix or path.suffix[1:].isdigit():  # scanners name files IM0001, or by their unique identifier
            with open(path, "rb") as stream:
                if stream.read(132)[128:] == b"DICM":
                    yield path


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
    header = {k: reader.GetMetaData(k) for k in (POSITION, ORIENTATION, PIXEL_SPACING, MODALITY) if k in known}
    return header | {"size": "x".join(map(str, reader.GetSize()))}


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split("\\")]
