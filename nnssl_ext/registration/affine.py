"""Where the search for a deformation starts: a transform between world coordinates, given or found by SimpleITK."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import numpy as np
import SimpleITK as sitk

from nnssl_ext.errors import NnsslError, unknown_name
from nnssl_ext.registration.images import Scan, view_field

Start = Literal["auto", "none", "centre", "rigid", "affine"]

MEET = 0.25
"""``auto`` trusts the headers if the fields of view share at least this part of the smaller one (our choice)."""
BINS, SAMPLES = (
    50,
    100_000,
)  # Mattes mutual information: SimpleITK's own examples; samples bound the time of large scans
SHRINK, SMOOTH_MM = (4, 2, 1), (4.0, 2.0, 0.0)
# Steps shrink when the direction turns. On a turned, shifted and inverted volume of noise this came within 0.1 mm, plain gradient
# descent with a convergence window stopped 3 to 7 mm away (measured).
STEP, STOP, RELAXATION, ITERATIONS = 2.0, 1e-3, 0.7, 100


def initial_transform(fixed: Scan, moving: Scan, start: str | Path = "auto") -> tuple[sitk.Transform, str]:
    """A transform from world points of the fixed scan to world points of the moving one.

    Args:
        start: ``none`` trusts the headers; ``centre`` puts the foregrounds' centres of mass onto each other; ``rigid`` and
            ``affine`` then maximise mutual information; ``auto`` is ``none`` where the fields of view meet, else ``centre``;
            anything else is the file of a transform that SimpleITK reads.

    Returns:
        The transform, and one sentence about it.

    Raises:
        NnsslError: no such file or no such way to start, or a registration that found no common ground.
    """
    if start == "auto":
        share = _shared(fixed, moving)
        if share >= MEET:
            return sitk.Transform(3, sitk.sitkIdentity), "the headers' positions were trusted"
        shift = _centred(fixed, moving)
        return shift, f"the fields of view share {share:.0%} only, so the centres of the foregrounds were aligned"
    if start == "none":
        return sitk.Transform(3, sitk.sitkIdentity), "the headers' positions were trusted"
    if start == "centre":
        return _centred(fixed, moving), "the centres of the foregrounds were aligned"
    if start in ("rigid", "affine"):
        return _by_mutual_information(fixed, moving, rigid=start == "rigid"), f"{start} by mutual information"
    return _read(Path(start)), f"read from {Path(start).name}"


def check_invertible(start: str) -> None:
    """Find out before any work whether a given start can be inverted; those that are found always can.

    Raises:
        NnsslError: it cannot, or it is no transform.
    """
    if start not in get_args(Start):
        inverse_of(_read(Path(start)), start)


def inverse_of(transform: sitk.Transform, name: str) -> sitk.Transform:
    """The inverse of a transform.

    Raises:
        NnsslError: it has none in closed form, as a displacement field.
    """
    try:
        return transform.GetInverse()
    except RuntimeError as error:
        raise NnsslError(
            f"{name} cannot be inverted", "leave --inverse out, or start from a rigid or affine transform"
        ) from error


def _read(path: Path) -> sitk.Transform:
    if not path.is_file():
        if path.suffix:
            raise NnsslError(f"{path}: no such file", "give a transform that SimpleITK reads, or --init affine")
        raise unknown_name("way to start", path.name, get_args(Start))
    try:
        transform = sitk.ReadTransform(str(path))
    except RuntimeError as error:
        raise NnsslError(
            f"{path}: no transform: {str(error).strip().splitlines()[-1]}", "give an .h5, .tfm, .mat or .txt of ITK"
        ) from error
    if transform.GetDimension() != 3:
        raise NnsslError(f"{path}: a {transform.GetDimension()}D transform where 3D is needed", "give another one")
    return transform


def _shared(fixed: Scan, moving: Scan) -> float:
    """What the fields of view have in common, as part of the smaller one."""
    grid = fixed.grid
    common = view_field(moving.image, grid).mean() * np.prod(grid.size) * np.prod(grid.spacing)
    volumes = [float(np.prod(scan.grid.size) * np.prod(scan.grid.spacing)) for scan in (fixed, moving)]
    return float(common) / min(volumes)


def _centred(fixed: Scan, moving: Scan) -> sitk.Transform:
    shift = _centre_of_mass(moving) - _centre_of_mass(fixed)
    return sitk.TranslationTransform(3, shift.tolist())


def _centre_of_mass(scan: Scan) -> np.ndarray:
    """World position of the foreground's centre, mm."""
    z, y, x = np.argwhere(scan.foreground()).mean(axis=0)
    return np.array(scan.image.TransformContinuousIndexToPhysicalPoint((float(x), float(y), float(z))))


def _by_mutual_information(fixed: Scan, moving: Scan, rigid: bool) -> sitk.Transform:
    """Coarse to fine; samples are drawn with a fixed seed, so the result is reproducible."""
    images = [sitk.Cast(scan.image, sitk.sitkFloat32) for scan in (fixed, moving)]
    transform = sitk.Euler3DTransform() if rigid else sitk.AffineTransform(3)
    transform.SetCenter(_centre_of_mass(fixed).tolist())
    transform.SetTranslation((_centre_of_mass(moving) - _centre_of_mass(fixed)).tolist())
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(BINS)
    method.SetMetricSamplingStrategy(method.RANDOM)
    method.SetMetricSamplingPercentage(min(1.0, SAMPLES / np.prod(fixed.grid.size)), seed=1)
    for scan, set_mask in ((fixed, method.SetMetricFixedMask), (moving, method.SetMetricMovingMask)):
        if scan.mask is not None:
            set_mask(sitk.Cast(scan.mask > 0, sitk.sitkUInt8))
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(STEP, STOP, ITERATIONS, RELAXATION, gradientMagnitudeTolerance=1e-8)
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel(_shrink(fixed))
    method.SetSmoothingSigmasPerLevel(SMOOTH_MM)
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
    method.SetInitialTransform(transform, inPlace=True)
    try:
        method.Execute(*images)
    except RuntimeError as error:
        raise NnsslError(
            f"no {'rigid' if rigid else 'affine'} start for {moving.path} on {fixed.path}: "
            f"{str(error).strip().splitlines()[-1]}",
            "use --init centre, or give a transform",
        ) from error
    return transform


def _shrink(scan: Scan) -> list[int]:
    """The shrink factors, lower where an axis would be left with fewer than 8 voxels."""
    most = max(1, min(scan.grid.size) // 8)
    return [min(factor, most) for factor in SHRINK]
