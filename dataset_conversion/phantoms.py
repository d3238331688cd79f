"""Phantom volumes that need no download: MR- and CT-like subjects with several labelled structures, each a template
anatomy seen through a known smooth warp.

The anatomy is a set of formulas over millimetre coordinates, so a subject is the template evaluated at warped points:
no interpolation stands between the labels and the warp, and the warp is ground truth for registration.
All sizes, intensities and noise levels are our choice; Hounsfield units follow the usual tissue ranges.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, UInt8
from scipy.ndimage import gaussian_filter

from nnssl_ext.errors import NnsslError

LABELS = {"background": 0, "organ": 1, "vessel": 2, "shell": 3, "nodules": 4, "bone": 5}
AIR, FAT, SOFT, LUMEN = 0, 6, 7, 8
"""Tissues without a label, numbered after the labels; air is everything outside the body."""
LESION, LESION_LABEL = 9, 6
"""Tissue and label of lesions, which only some settings have (`labels_of`). They are brighter than organ and soft tissue, which
they lie in."""

# Per tissue, in the order of its number: mean, standard deviation between subjects, amplitude of the texture.
HOUNSFIELD = np.array(
    [
        (-1000, 0, 0),  # air
        (105, 12, 12),  # organ, contrast enhanced
        (220, 30, 10),  # vessel, contrast enhanced
        (70, 10, 10),  # shell
        (15, 10, 8),  # nodules, cystic
        (600, 80, 150),  # bone
        (-95, 8, 10),  # fat
        (45, 8, 15),  # soft tissue
        (0, 3, 2),  # lumen, fluid
        (150, 10, 10),  # lesion
    ],
    float,
)
RELATIVE_SIGNAL = np.array(
    [
        (0, 0, 0),  # air
        (0.80, 0.05, 0.06),  # organ
        (0.35, 0.05, 0.03),  # vessel, flow void
        (0.45, 0.04, 0.04),  # shell
        (0.95, 0.08, 0.06),  # nodules
        (0.20, 0.03, 0.05),  # bone
        (1.10, 0.08, 0.06),  # fat
        (0.60, 0.03, 0.05),  # soft tissue
        (0.30, 0.03, 0.02),  # lumen
        (1.05, 0.04, 0.05),  # lesion
    ]
)

TEXTURE_WAVELENGTHS = (4.0, 14.0)  # mm
WARP_WAVELENGTHS = (50.0, 110.0)  # mm, around the size of the body
BIAS_WAVELENGTHS = (80.0, 160.0)  # mm, a coil's reach
POINT_SPREAD = 0.7  # mm, standard deviation of the Gaussian blur of the scanner
LESION_RADII = (3.0, 6.0)  # mm, half axes of ellipsoids


@dataclass(frozen=True)
class PhantomSettings:
    """How phantoms look.

    Attributes:
        modality: ``"mr"`` (bias field, Rician noise, arbitrary scale) or ``"ct"`` (Hounsfield units, Gaussian noise).
        field_of_view: mm along z, y, x; the body measures about 68 x 78 x 70 mm.
        spacing: mm along z, y, x.
        spacing_jitter: each subject's spacing is this times a factor within 1 -+ jitter, per axis.
        deformation: strict bound of the warp's gradient, in [0, 1); below 1 no warp can fold. 0 is the template.
        noise: standard deviation of the noise, as a share of soft tissue in MR, of 100 HU in CT.
        contrast: factor on what tells the structures inside the body from soft tissue, in (0, 1].
        lesions: small ellipsoids per subject in organ and soft tissue, at places of its own, under a further label. They are
            not in the template: the warp is the truth for everything else.
    """

    modality: Literal["mr", "ct"] = "mr"
    field_of_view: tuple[float, float, float] = (72.0, 82.0, 74.0)
    spacing: tuple[float, float, float] = (3.0, 2.4, 2.4)
    spacing_jitter: float = 0.1
    deformation: float = 0.8
    noise: float = 0.08
    contrast: float = 1.0
    lesions: int = 0


HARD = PhantomSettings(noise=0.12, contrast=0.6, lesions=12)
"""Many small structures at low contrast, for comparisons that the default phantoms are too easy for."""


def labels_of(settings: PhantomSettings) -> dict[str, int]:
    """Name -> value of the labels that these phantoms have."""
    return {**LABELS, "lesions": LESION_LABEL} if settings.lesions else dict(LABELS)


@dataclass(frozen=True)
class Phantom:
    """One subject.

    Attributes:
        image: ``(Z, Y, X)``.
        labels: ``(Z, Y, X)``, values of `LABELS`.
        spacing: mm along z, y, x.
        displacement: ``(3, Z, Y, X)`` in mm along z, y, x, subject point -> template point: subject labels at ``p`` are
            template labels at ``p + displacement(p)``. Points are measured from the centre of the volume.
    """

    image: Float[np.ndarray, "Z Y X"]
    labels: UInt8[np.ndarray, "Z Y X"]
    spacing: tuple[float, float, float]
    displacement: Float[np.ndarray, "3 Z Y X"]

    def __str__(self) -> str:
        size = "x".join(map(str, self.image.shape))
        return f"phantom of {size} voxels of {tuple(round(s, 2) for s in self.spacing)} mm"


def generate_phantom(settings: PhantomSettings, seed: int) -> Phantom:
    """One subject; the same settings and seed give the same voxels.

    Args:
        settings: how it looks.
        seed: which subject. All subjects of any settings share one template anatomy and its texture.

    Raises:
        NnsslError: a setting that cannot work, named.
    """
    _check(settings)
    rng = np.random.default_rng([seed, 0])
    spacing = np.asarray(settings.spacing) * rng.uniform(1 - settings.spacing_jitter, 1 + settings.spacing_jitter, 3)
    points = grid_points(np.round(np.asarray(settings.field_of_view) / spacing).astype(int), spacing)
    displacement = _warp(points, settings.deformation, rng)
    tissues = tissue_at(points + displacement)
    if settings.lesions:
        _add_lesions(tissues, points, settings.lesions, np.random.default_rng([seed, 1]))
    looks = _looks(settings, last=LESION if settings.lesions else LUMEN)
    signal = _signal(tissues, points + displacement, spacing, looks, rng)
    if settings.modality == "mr":
        image = _mr_scan(signal, points, settings.noise * RELATIVE_SIGNAL[SOFT, 0], rng)
    else:
        image = _ct_scan(signal, settings.noise * 100, rng)
    labels = np.where(tissues > max(LABELS.values()), 0, tissues).astype(np.uint8)
    labels[tissues == LESION] = LESION_LABEL
    z, y, x = map(float, spacing)
    return Phantom(image.astype(np.float32), labels, (z, y, x), displacement.astype(np.float32))


def grid_points(shape: np.ndarray, spacing: np.ndarray) -> Float[np.ndarray, "3 Z Y X"]:
    """Coordinates in mm, z y x, of every voxel centre, measured from the centre of the volume."""
    axes = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, spacing, strict=True)]
    return np.stack(np.meshgrid(*axes, indexing="ij"))


def tissue_at(points: Float[np.ndarray, "3 Z Y X"]) -> UInt8[np.ndarray, "Z Y X"]:
    """The template anatomy: the tissue at each point, in mm from the centre of the body along z, y, x.

    Tissues 1 to 5 are `LABELS`; the others are `AIR`, `FAT`, `SOFT` and `LUMEN`. Later structures lie over earlier ones.
    """
    z, y, x = points

    def ellipsoid(centre: tuple[float, float, float], radii: tuple[float, float, float]) -> np.ndarray:
        return sum(((p - c) / r) ** 2 for p, c, r in zip(points, centre, radii, strict=True)) < 1

    # a tube that winds once around the body's axis, with the slope of its course taken out of its width
    vessel = (y - 3 - 6 * np.sin(z / 9)) ** 2 + (x - 1 - 4 * np.cos(z / 9)) ** 2 < 4.8**2 * (1 + (5 / 9) ** 2)
    blobs = ((17.0, -10.0, 12.0), (11.0, -15.0, 17.0), (21.0, -3.0, 15.0))
    nodules = sum(np.exp(-sum((p - c) ** 2 for p, c in zip(points, blob, strict=True)) / 60.0) for blob in blobs) > 0.45
    bone = (y - 23) ** 2 + (x / 1.3) ** 2 < (7.5 + 1.5 * np.cos(2 * np.pi * z / 14)) ** 2

    tissues = np.full(z.shape, AIR, np.uint8)
    tissues[ellipsoid((0.0, 0.0, 0.0), (34.0, 39.0, 35.0))] = FAT
    body = ellipsoid((0.0, 0.0, 0.0), (31.0, 35.0, 31.0))
    tissues[body] = SOFT
    tissues[body & bone] = LABELS["bone"]
    tissues[body & vessel] = LABELS["vessel"]
    tissues[body & ellipsoid((3.0, -7.0, -15.0), (20.0, 20.0, 13.0))] = LABELS["organ"]
    tissues[ellipsoid((-9.0, -8.0, 14.0), (15.0, 14.0, 12.0))] = LABELS["shell"]
    tissues[ellipsoid((-9.0, -8.0, 14.0), (10.0, 9.0, 7.5))] = LUMEN
    tissues[body & nodules] = LABELS["nodules"]
    return tissues


def _add_lesions(
    tissues: UInt8[np.ndarray, "Z Y X"], points: Float[np.ndarray, "3 Z Y X"], count: int, rng: np.random.Generator
) -> None:
    """Draw `count` lesions into `tissues`, none of which touches another; they replace organ and soft tissue only.

    Raises:
        NnsslError: there is no room for so many.
    """
    host = np.isin(tissues, (LABELS["organ"], SOFT))
    free = host.copy()
    for _ in range(count):
        if not free.any():
            raise NnsslError(f"no room for {count} lesions in a phantom", "ask for fewer")
        centre = points[:, free][:, rng.integers(free.sum())][:, None, None, None]
        radii = rng.uniform(*LESION_RADII, 3)[:, None, None, None]
        tissues[host & (np.sum(((points - centre) / radii) ** 2, axis=0) < 1)] = LESION
        free &= np.sum((points - centre) ** 2, axis=0) > (2 * LESION_RADII[1] + 1) ** 2


def _looks(settings: PhantomSettings, last: int) -> Float[np.ndarray, "tissues 3"]:
    """Mean, spread and texture of the tissues up to number `last`."""
    looks = (RELATIVE_SIGNAL if settings.modality == "mr" else HOUNSFIELD)[: last + 1].copy()
    inside = [tissue for tissue in range(last + 1) if tissue not in (AIR, FAT)]
    looks[inside, 0] = looks[SOFT, 0] + settings.contrast * (looks[inside, 0] - looks[SOFT, 0])
    return looks


def _warp(points: Float[np.ndarray, "3 Z Y X"], bound: float, rng: np.random.Generator) -> Float[np.ndarray, "3 Z Y X"]:
    """A sum of plane waves. The norm of its gradient is at most the sum over waves of amplitude times wave number; that
    sum is `bound` < 1, so ``p + u(p)`` is one-to-one and its Jacobian determinant positive everywhere."""
    directions, phases = _waves(5, WARP_WAVELENGTHS, rng)
    amplitudes = rng.normal(size=(len(phases), 3))
    steepness = np.linalg.norm(amplitudes, axis=1) @ np.linalg.norm(directions, axis=1)
    amplitudes *= bound / steepness
    waves = np.sin(np.tensordot(directions, points, 1) + phases[:, None, None, None])
    return np.tensordot(amplitudes.T, waves, 1)


def _texture(points: Float[np.ndarray, "3 Z Y X"]) -> Float[np.ndarray, "Z Y X"]:
    """The template's texture, of about unit variance; a function of template points, so it moves with the anatomy."""
    directions, phases = _waves(24, TEXTURE_WAVELENGTHS, np.random.default_rng(0))
    field = sum(np.sin(np.tensordot(d, points, 1) + p) for d, p in zip(directions, phases, strict=True))
    return field * np.sqrt(2 / len(phases))


def _waves(
    count: int, wavelengths: tuple[float, float], rng: np.random.Generator
) -> tuple[Float[np.ndarray, "N 3"], Float[np.ndarray, " N"]]:
    """Wave vectors (radians per mm) in random directions, and phases."""
    directions = rng.normal(size=(count, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    directions *= 2 * np.pi / rng.uniform(*wavelengths, size=(count, 1))
    return directions, rng.uniform(0, 2 * np.pi, count)


def _signal(
    tissues: UInt8[np.ndarray, "Z Y X"],
    template_points: Float[np.ndarray, "3 Z Y X"],
    spacing: Float[np.ndarray, " 3"],
    looks: Float[np.ndarray, "tissues 3"],
    rng: np.random.Generator,
) -> Float[np.ndarray, "Z Y X"]:
    """Mean and texture of each tissue, blurred as by a scanner's point spread."""
    mean, spread, texture = looks.T
    mean = rng.normal(mean, spread)
    return gaussian_filter(mean[tissues] + texture[tissues] * _texture(template_points), POINT_SPREAD / spacing)


def _ct_scan(signal: Float[np.ndarray, "Z Y X"], sigma: float, rng: np.random.Generator) -> Float[np.ndarray, "Z Y X"]:
    """Whole Hounsfield units with Gaussian noise, clipped to a scanner's 12 bits."""
    return np.clip(np.round(rng.normal(signal, sigma)), -1024, 3071)


def _mr_scan(
    signal: Float[np.ndarray, "Z Y X"], points: Float[np.ndarray, "3 Z Y X"], sigma: float, rng: np.random.Generator
) -> Float[np.ndarray, "Z Y X"]:
    """Magnitude of a noisy complex signal (Rician noise) under a smooth coil sensitivity, in units that mean nothing
    across subjects."""
    directions, phases = _waves(3, BIAS_WAVELENGTHS, rng)
    bias = np.exp(0.12 * sum(np.sin(np.tensordot(d, points, 1) + p) for d, p in zip(directions, phases, strict=True)))
    real, imaginary = rng.normal(scale=sigma, size=(2, *signal.shape))
    return 10 ** rng.uniform(1.5, 4) * np.hypot(signal * bias + real, imaginary)


def _check(settings: PhantomSettings) -> None:
    if not 0 <= settings.deformation < 1:
        raise NnsslError(f"phantom deformation {settings.deformation} may fold", "use a value in [0, 1)")
    if not 0 < settings.contrast <= 1 or settings.lesions < 0:
        raise NnsslError(
            f"phantoms with contrast {settings.contrast} and {settings.lesions} lesions",
            "use a contrast in (0, 1] and 0 or more lesions",
        )
    if min(settings.spacing) <= 0 or min(np.divide(settings.field_of_view, settings.spacing)) < 8:
        raise NnsslError(
            f"phantoms of {settings.field_of_view} mm at {settings.spacing} mm have under 8 voxels along an axis",
            "widen field_of_view or lower spacing (mm, positive)",
        )
