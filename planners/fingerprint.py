"""What planning must know about a data set, found without labels: one small worker per case, one JSON file per data set."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero
from tqdm import tqdm

from nnssl_ext.data.foreground import foreground_mask
from nnssl_ext.errors import NnsslError
from nnssl_ext.files import read_json, write_json
from nnssl_ext.planners.normalization import PERCENTILES, tail_reach

FILE = "nnssl_fingerprint.json"
SCHEMA = 1

MOST_VOXELS = 20_000_000
"""Foreground voxels per channel that data set statistics are taken from, 80 MB (nnU-Net: 1e8)."""
VOXELS_PER_CASE = 20_000
"""At most this many of them from one case: percentiles 0.5 and 99.5 then rest on 100 voxels each."""


@dataclass(frozen=True)
class CaseFingerprint:
    """One case.

    Attributes:
        files: name, bytes and modification time (ns) of each channel's file, to notice changes.
        spacing: mm along z, y, x.
        shape_after_crop: voxels after nnU-Net's cropping to nonzero.
        relative_size_after_crop: share of the voxels that cropping keeps.
        foreground_share: share of the cropped voxels that label-free foreground covers.
        channels: per channel nnU-Net's statistics of the raw foreground intensities (mean, median, std, min, max,
            percentile_00_5, percentile_99_5) and ``tail_reach`` (`nnssl_ext.planners.normalization.tail_reach`).
    """

    files: list[list[Any]]
    spacing: list[float]
    shape_after_crop: list[int]
    relative_size_after_crop: float
    foreground_share: float
    channels: list[dict[str, float]]


def label_free_fingerprint(
    images: Mapping[str, Sequence[str]], reader: type[BaseReaderWriter], folder: Path, processes: int
) -> dict[str, Any]:
    """The fingerprint in `folder`, computed if it is missing or any image was added, removed or changed.

    Args:
        images: case identifier -> one file per channel.
        reader: nnU-Net's reader for these files.
        folder: preprocessed data set folder; ``nnssl_fingerprint.json`` is written there.
        processes: worker processes; 1 works in this process.

    Returns:
        The JSON content: ``cases`` (identifier -> `CaseFingerprint`) and nnU-Net's fields ``spacings``,
        ``shapes_after_crop``, ``median_relative_size_after_cropping``, ``foreground_intensity_properties_per_channel``.

    Raises:
        NnsslError: an image cannot be used, naming case and file.
    """
    path = folder / FILE
    if path.is_file():
        known = read_json(path)
        if known.get("schema") == SCHEMA and {k: c["files"] for k, c in known["cases"].items()} == {
            k: _stamps(files) for k, files in images.items()
        }:
            return dict(known)
    count = min(VOXELS_PER_CASE, max(1, MOST_VOXELS // len(images)))
    cases, samples = {}, []
    progress = tqdm(_each(images, reader, count, processes), total=len(images), desc="Label-free fingerprint")
    for identifier, case, sample in progress:
        cases[identifier] = case
        samples.append(sample)
    ordered = [cases[identifier] for identifier in images]
    pooled = np.concatenate(samples, axis=1)
    fingerprint = {
        "schema": SCHEMA,
        "spacings": [case.spacing for case in ordered],
        "shapes_after_crop": [case.shape_after_crop for case in ordered],
        "median_relative_size_after_cropping": float(np.median([case.relative_size_after_crop for case in ordered])),
        "median_foreground_share": float(np.median([case.foreground_share for case in ordered])),
        "foreground_intensity_properties_per_channel": {
            str(channel): _statistics(values) for channel, values in enumerate(pooled)
        },
        "cases": {identifier: asdict(cases[identifier]) for identifier in images},
    }
    write_json(path, fingerprint)
    return fingerprint


def analyse_case(
    identifier: str, files: Sequence[str], reader: type[BaseReaderWriter], count: int
) -> tuple[str, CaseFingerprint, Float[np.ndarray, "C _N"]]:
    """Fingerprint of one case and up to `count` raw foreground voxels, evenly spread.

    Raises:
        NnsslError: unreadable, not 3D, NaN or infinite voxels, or nothing but one value.
    """
    stamps = _stamps(files)
    try:
        image, properties = reader().read_images(list(files))
    except Exception as error:  # readers raise whatever their library raises
        raise NnsslError(
            f"case {identifier}: cannot read {', '.join(files)}: {error}", "repair or remove the case"
        ) from error
    if not np.isfinite(image).all():
        raise NnsslError(
            f"case {identifier}: NaN or infinite voxels in {', '.join(files)}", "repair or remove the case"
        )
    if not image.any():
        raise NnsslError(f"case {identifier}: all voxels are 0 in {', '.join(files)}", "repair or remove the case")
    shape = image.shape[1:]
    image, _, _ = crop_to_nonzero(image)
    mask = np.zeros(image.shape[1:], dtype=bool)
    problems = []
    for file, channel in zip(files, image, strict=True):
        try:
            mask |= foreground_mask(channel)
        except NnsslError as error:
            problems.append(f"{file}: {error.what}")
    if not mask.any():
        raise NnsslError(f"case {identifier}: {'; '.join(problems)}", "repair or remove the case")
    foreground = image[:, mask].astype(np.float32)
    case = CaseFingerprint(
        files=stamps,
        spacing=[float(s) for s in properties["spacing"]],
        shape_after_crop=[int(s) for s in mask.shape],
        relative_size_after_crop=float(mask.size / np.prod(shape)),
        foreground_share=float(mask.mean()),
        channels=[{**_statistics(values), "tail_reach": tail_reach(values)} for values in foreground],
    )
    picked = np.linspace(0, foreground.shape[1] - 1, min(count, foreground.shape[1])).round().astype(int)
    return identifier, case, foreground[:, picked]


def _each(
    images: Mapping[str, Sequence[str]], reader: type[BaseReaderWriter], count: int, processes: int
) -> Iterator[tuple[str, CaseFingerprint, np.ndarray]]:
    if processes <= 1:
        for identifier, files in images.items():
            yield analyse_case(identifier, files, reader, count)
        return
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = [pool.submit(analyse_case, identifier, files, reader, count) for identifier, files in images.items()]
        try:
            for done in as_completed(waiting):
                yield done.result()
        except BrokenProcessPool as error:
            raise NnsslError(
                "a fingerprint worker was killed, most likely for lack of memory",
                f"use fewer workers: export nnUNet_def_n_proc={max(1, processes // 2)}",
            ) from error
        except NnsslError:
            pool.shutdown(cancel_futures=True)
            raise


def _statistics(values: Float[np.ndarray, " N"]) -> dict[str, float]:
    """nnU-Net's ``foreground_intensity_properties`` of one channel."""
    low, median, high = np.percentile(values, [PERCENTILES[0], 50, PERCENTILES[1]])
    return {
        "mean": float(values.mean(dtype=np.float64)),
        "median": float(median),
        "std": float(values.std(dtype=np.float64)),
        "min": float(values.min()),
        "max": float(values.max()),
        "percentile_99_5": float(high),
        "percentile_00_5": float(low),
    }


def _stamps(files: Sequence[str]) -> list[list[Any]]:
    try:
        return [[Path(file).name, Path(file).stat().st_size, Path(file).stat().st_mtime_ns] for file in files]
    except OSError as error:
        raise NnsslError(
            f"cannot read {error.filename}: {error.strerror}", "check imagesTr and dataset.json"
        ) from error
