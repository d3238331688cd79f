"""One method on one pair: computed once, kept as a file, found again by the next run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import SimpleITK as sitk
import torch
from jaxtyping import Float

from nnssl_ext.errors import NnsslError
from nnssl_ext.files import read_json, write_json
from nnssl_ext.registration.batch import sums_of
from nnssl_ext.registration.benchmark.meter import metered
from nnssl_ext.registration.benchmark.methods import Method, prepare
from nnssl_ext.registration.benchmark.pairs import LabelledPair
from nnssl_ext.registration.features import FeatureSource
from nnssl_ext.registration.images import load_scan
from nnssl_ext.registration.outputs import displacement_image, measure
from nnssl_ext.registration.pipeline import PairSettings, Registration

KEPT = ("labels_after", "smoothness_foreground", "smoothness_grid", "displacement_mm", "notes")
"""What of `outputs.measure` is kept."""


@dataclass(frozen=True)
class Cell:
    """A method with settings on a pair.

    Attributes:
        variant: which settings are tried, for the name of the file.
        strengths: of regularisation; one registration for each. None: as the method has it.
        digest: what the method's figures depend on, from `Method.digest`.
    """

    method: Method
    part: Literal["development", "test"]
    variant: str
    settings: PairSettings
    seed: int
    pair: LabelledPair
    strengths: tuple[float | None, ...]
    digest: dict[str, Any] = field(compare=False)

    def __str__(self) -> str:
        seed = f", seed {self.seed}" if len(self.method.seeds) > 1 else ""
        return f"{self.method.name} on {self.part} pair {self.pair.name}{seed}"

    def path(self, output: Path) -> Path:
        """Where it is kept."""
        return output / "cells" / self.method.name / self.part / self.variant / f"{self.pair.name}_seed{self.seed}.json"

    def request(self) -> dict[str, Any]:
        """Everything that its figures depend on, as it reads from a file."""
        files = replace(self.pair.files, init=self.settings.init)
        asked = {
            "version": version("nnssl-ext"),
            "method": self.digest,
            "settings": asdict(self.settings),
            "seed": self.seed,
            "pair": self.pair.as_json(),
            "content": sums_of(files.paths() | self.pair.landmarks),
            "strengths": self.strengths,
        }
        return json.loads(json.dumps(asked))

    def finished(self, output: Path) -> dict[str, Any] | None:
        """What an earlier run found for the same request."""
        try:
            found = read_json(self.path(output))
        except NnsslError:
            return None
        return found if isinstance(found, dict) and found.get("request") == self.request() else None


def run_cell(cell: Cell, sources: Sequence[FeatureSource], output: Path, device: torch.device) -> dict[str, Any]:
    """Register, measure, and keep the figures; one entry of ``results`` per strength.

    Raises:
        NnsslError: files that cannot be read or registered.
    """
    request = cell.request()  # before loading: what changes in between is then computed again next time
    files = cell.pair.files
    fixed = load_scan(files.fixed, files.fixed_mask, files.fixed_labels)
    moving = load_scan(files.moving, files.moving_mask, files.moving_labels)
    with metered(device) as preparing:
        solve = prepare(cell.method, cell.settings, sources, fixed, moving, device)
    results = []
    for strength in cell.strengths:
        with metered(device, since=preparing) as solving:
            registration = solve(strength)
        peaks = [cost.memory_gib for cost in (preparing, solving) if cost.memory_gib is not None]
        results.append(
            {
                "strength": strength,
                **_figures(registration, cell.pair),
                "seconds": {"prepare": preparing.seconds, "solve": solving.seconds},
                "cpu_seconds": preparing.cpu_seconds + solving.cpu_seconds,
                "peak_memory_gib": max(peaks, default=None),
            }
        )
    content = {"request": request, "results": results}
    write_json(cell.path(output), content)
    return content


def landmark_error(
    transform: sitk.Transform,
    fixed: sitk.Image,
    moving: sitk.Image,
    fixed_points: Float[np.ndarray, "N 3"],
    moving_points: Float[np.ndarray, "N 3"],
) -> Float[np.ndarray, " N"]:
    """Distance in mm between where the transform takes each fixed landmark and the moving landmark.

    Args:
        transform: world point of the fixed scan -> world point of the moving scan.
        fixed_points, moving_points: voxels x, y, z of the two images, not necessarily whole.
    """
    apart = []
    for a, b in zip(fixed_points, moving_points, strict=True):
        arrived = transform.TransformPoint(fixed.TransformContinuousIndexToPhysicalPoint(a.tolist()))
        apart.append(np.subtract(arrived, moving.TransformContinuousIndexToPhysicalPoint(b.tolist())))
    return np.linalg.norm(apart, axis=1)


def _figures(registration: Registration, pair: LabelledPair) -> dict[str, Any]:
    image = displacement_image(registration)
    transform = sitk.DisplacementFieldTransform(sitk.Cast(image, sitk.sitkVectorFloat64))
    measured = measure(registration, transform, pair.ignore)
    found = {name: measured[name] for name in KEPT if name in measured}
    if pair.fixed_landmarks and pair.moving_landmarks:
        points = [_read_points(path) for path in (pair.fixed_landmarks, pair.moving_landmarks)]
        if len(points[0]) != len(points[1]):
            raise NnsslError(
                f"{pair.fixed_landmarks} has {len(points[0])} points, {pair.moving_landmarks} {len(points[1])}",
                "give corresponding points in the same order",
            )
        # landmarks count voxels as in the files, scans in memory may be flipped
        fixed, moving = (sitk.ReadImage(str(path)) for path in (pair.files.fixed, pair.files.moving))
        found["tre_mm"] = float(landmark_error(transform, fixed, moving, points[0], points[1]).mean())
    return found


def _read_points(path: Path) -> Float[np.ndarray, "N 3"]:
    try:
        return np.loadtxt(path, delimiter=",", ndmin=2, usecols=(0, 1, 2), dtype=np.float64)
    except (OSError, ValueError) as error:
        raise NnsslError(f"{path}: {error}", "give a CSV of x,y,z per line, without a header") from error
