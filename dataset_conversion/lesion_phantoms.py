"""Chest phantoms with lesions, for trying lesion segmentation without data: two aerated lungs, vessels in them, and a few nodules.

Vessels have the density of the nodules, so that shape has to tell them apart. All sizes, counts and intensities are our choice;
Hounsfield units follow the usual tissue ranges.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from jaxtyping import Float, Int16, UInt8
from scipy.ndimage import gaussian_filter
from tqdm import tqdm

from nnssl_ext.dataset_conversion.phantoms import grid_points
from nnssl_ext.dataset_conversion.whole_folder import whole_folder
from nnssl_ext.errors import NnsslError
from nnssl_ext.files import write_json

AIR, FAT, SOFT, LUNG, LESION = -1000.0, -95.0, 45.0, -850.0, 35.0  # HU
LUNGS = ((0.0, 0.0, -20.0), (0.0, 0.0, 20.0))  # centres, mm
LUNG_RADII = (34.0, 23.0, 14.0)  # mm; walls of at least 7 mm stay around them
VESSEL_RADII = (0.8, 2.0)  # mm, smallest and largest
MARGIN = 0.8  # a lesion's centre lies within this share of the lung's radii
POINT_SPREAD = 0.7  # mm, standard deviation of the scanner's blur


@dataclass(frozen=True)
class LesionPhantomSettings:
    """How phantoms look.

    Attributes:
        field_of_view: mm along z, y, x; the chest measures about 96 x 74 x 90 mm.
        spacing: mm along z, y, x.
        lesions: smallest and largest number per case; 0 gives healthy cases.
        radii: mm, smallest and largest radius of a lesion.
        vessels: per lung.
        noise: standard deviation, HU.
    """

    field_of_view: tuple[float, float, float] = (110.0, 88.0, 104.0)
    spacing: tuple[float, float, float] = (2.4, 2.0, 2.0)
    lesions: tuple[int, int] = (0, 4)
    radii: tuple[float, float] = (2.5, 6.0)
    vessels: int = 12
    noise: float = 20.0


@dataclass(frozen=True)
class LesionPhantom:
    """One case.

    Attributes:
        image: ``(Z, Y, X)`` HU.
        labels: ``(Z, Y, X)``, 1 in lesions.
        spacing: mm along z, y, x.
        lesions: how many there are; they neither touch nor overlap.
    """

    image: Int16[np.ndarray, "Z Y X"]
    labels: UInt8[np.ndarray, "Z Y X"]
    spacing: tuple[float, float, float]
    lesions: int


def generate_lesion_phantom(settings: LesionPhantomSettings, seed: int) -> LesionPhantom:
    """One case; the same settings and seed give the same voxels."""
    rng = np.random.default_rng([seed, 1])
    spacing = np.asarray(settings.spacing)
    points = grid_points(np.round(np.asarray(settings.field_of_view) / spacing).astype(int), spacing)
    size = rng.uniform(0.9, 1.1)  # of the patient
    hounsfield = np.full(points.shape[1:], AIR)
    hounsfield[_ellipsoid(points, (0, 0, 0), np.array([48.0, 37.0, 45.0]) * size)] = FAT
    hounsfield[_ellipsoid(points, (0, 0, 0), np.array([44.0, 33.0, 41.0]) * size)] = SOFT
    radii = np.array(LUNG_RADII) * size
    for centre in np.array(LUNGS) * size:
        lung = _ellipsoid(points, centre, radii)
        hounsfield[lung] = LUNG
        for _ in range(settings.vessels):
            hounsfield[lung & _tube(points, centre + _within(radii, rng), rng)] = SOFT
    labels = np.zeros(hounsfield.shape, np.uint8)
    placed: list[tuple[np.ndarray, float]] = []
    for _ in range(int(rng.integers(settings.lesions[0], settings.lesions[1] + 1))):
        centre, radius = _room(placed, radii, size, settings, rng)
        placed.append((centre, radius))
        labels[_ellipsoid(points, centre, radius * rng.uniform(0.8, 1.0, 3))] = 1
    hounsfield[labels == 1] = LESION
    image = rng.normal(gaussian_filter(hounsfield, POINT_SPREAD / spacing), settings.noise)
    z, y, x = map(float, spacing)
    return LesionPhantom(np.clip(np.round(image), -1024, 3071).astype(np.int16), labels, (z, y, x), len(placed))


def write_lesion_task(folder: Path, settings: LesionPhantomSettings, count: int, first_seed: int = 0) -> None:
    """Write cases ``chest_000`` ... as a task folder in the layout of the Medical Segmentation Decathlon.

    Args:
        folder: must not exist; appears whole or not at all.
        settings: how they look.
        count: number of cases; case ``i`` has the seed ``first_seed + i``.

    Raises:
        NnsslError: the folder exists or cannot be written.
    """
    if folder.exists():
        raise NnsslError(f"{folder} exists already", "remove it, or choose another folder")
    names = [f"chest_{i:03d}" for i in range(count)]
    with whole_folder(folder) as building:
        for part in ("imagesTr", "labelsTr"):
            (building / part).mkdir()
        for seed, name in enumerate(tqdm(names, desc="phantoms", unit="case", disable=None), start=first_seed):
            phantom = generate_lesion_phantom(settings, seed)
            for part, array in (("imagesTr", phantom.image), ("labelsTr", phantom.labels)):
                image = sitk.GetImageFromArray(array)
                image.SetSpacing(phantom.spacing[::-1])
                sitk.WriteImage(image, str(building / part / f"{name}.nii.gz"))
        write_json(
            building / "dataset.json",
            {
                "name": "LesionPhantoms",
                "description": "synthetic chests with lesions in aerated lungs",
                "reference": "nnssl_ext.dataset_conversion.lesion_phantoms",
                "licence": "Apache-2.0",
                "tensorImageSize": "3D",
                "modality": {"0": "CT"},
                "labels": {"0": "background", "1": "lesion"},
                "numTraining": count,
                "numTest": 0,
                "training": [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in names],
                "test": [],
            },
        )


def _ellipsoid(points: Float[np.ndarray, "3 Z Y X"], centre: object, radii: object) -> np.ndarray:
    offset = points - np.asarray(centre, float)[:, None, None, None]
    return np.sum((offset / np.asarray(radii, float)[:, None, None, None]) ** 2, axis=0) < 1


def _tube(points: Float[np.ndarray, "3 Z Y X"], centre: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A straight vessel through a point, as long as the lung is."""
    direction = rng.normal(size=3)
    direction /= np.linalg.norm(direction)
    offset = points - centre[:, None, None, None]
    along = np.tensordot(direction, offset, 1)
    return np.sum(offset**2, axis=0) - along**2 < rng.uniform(*VESSEL_RADII) ** 2


def _within(radii: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A point uniform in `MARGIN` of an ellipsoid."""
    direction = rng.normal(size=3)
    return radii * MARGIN * rng.random() ** (1 / 3) * direction / np.linalg.norm(direction)


def _room(
    placed: list[tuple[np.ndarray, float]],
    radii: np.ndarray,
    size: float,
    settings: LesionPhantomSettings,
    rng: np.random.Generator,
) -> tuple[np.ndarray, float]:
    """Centre and radius of a lesion that keeps two voxels from the others."""
    gap = 2 * max(settings.spacing)
    for _ in range(1000):
        radius = rng.uniform(*settings.radii)
        centre = np.array(LUNGS[rng.integers(2)]) * size + _within(radii, rng)
        if all(np.linalg.norm(centre - other) > radius + reach + gap for other, reach in placed):
            return centre, radius
    raise NnsslError(f"no room for {len(placed) + 1} lesions", "lower lesions or radii")
