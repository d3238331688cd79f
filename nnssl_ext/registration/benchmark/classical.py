"""Registrations without features of a network: SimpleITK's, and where they are installed ANTs and the convexAdam package.

They see what our solver sees: both scans on the common grid, intensities between the percentiles 1 and 99 of the foreground as
0 to 1, the border repeated. Settings are those that did best on the hippocampus pairs of the Decathlon; lengths are in voxels.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk
import torch
from jaxtyping import Float
from torch.nn import functional as F

from nnssl_ext.errors import NnsslError
from nnssl_ext.registration.mind import mind
from nnssl_ext.registration.pipeline import DescribedPair
from nnssl_ext.registration.solver import Field, SolverSettings, register_features

Volume = Float[np.ndarray, "Z Y X"]
PACKAGE = {"grid_sp": 3, "disp_hw": 3, "grid_sp_adam": 2}
PACKAGE_LAMBDA = 1.25
CELLS = 6  # the package drops what pools of 3 and 2 do not divide, so images are filled up to multiples of both


@dataclass(frozen=True)
class Classical:
    """A registration of intensities.

    Attributes:
        about: one phrase.
        solve: finds the deformation of a pair described by its intensities, with a strength of `strengths` or None.
        strengths: of the regularisation, to be tried on development pairs; empty: as published, or nothing to choose.
        init: the start it needs, or "" for the one asked for.
        module, install: what has to be importable, and how to get it.
    """

    about: str
    solve: Callable[[DescribedPair, float | None], Field]
    strengths: tuple[float, ...] = ()
    init: str = ""
    module: str = ""
    install: str = ""

    def check(self) -> None:
        """Import what it needs.

        Raises:
            NnsslError: it is not installed.
        """
        if not self.module:
            return
        try:
            with warnings.catch_warnings():  # convexAdam silences all warnings of the process
                importlib.import_module(self.module)
        except ImportError as error:
            raise NnsslError(f"{self.about}: {error}", self.install) from error


def stay(pair: DescribedPair, strength: float | None) -> Field:
    """No deformation: what the start alone achieves."""
    return Field(torch.zeros(3, *pair.grid.size), pair.grid.spacing)


def demons(pair: DescribedPair, strength: float | None) -> Field:
    """Diffeomorphic demons (Vercauteren et al. 2009) on two levels of 100 iterations, histograms matched.

    Args:
        strength: standard deviation, in voxels, of the Gaussian that smooths the displacement after every step.
    """
    fixed, moving = (sitk.GetImageFromArray(volume) for volume in _volumes(pair))
    moving = sitk.HistogramMatching(moving, fixed, 256, 15, True)
    method = sitk.DiffeomorphicDemonsRegistrationFilter()
    method.SetNumberOfIterations(100)
    method.SetSmoothDisplacementField(True)
    method.SetStandardDeviations(1.5 if strength is None else strength)
    method.SetNumberOfThreads(torch.get_num_threads())
    half = [max(1, min(2, size // 8)) for size in fixed.GetSize()]
    coarse = method.Execute(sitk.BinShrink(fixed, half), sitk.BinShrink(moving, half))
    start = sitk.Resample(coarse, fixed, sitk.Transform(), sitk.sitkLinear, 0.0, sitk.sitkVectorFloat64, True)
    found = sitk.GetArrayFromImage(method.Execute(fixed, moving, start))
    return _field(pair, np.moveaxis(found[..., ::-1], -1, 0))


def syn(pair: DescribedPair, strength: float | None) -> Field:
    """ANTs SyN (Avants et al. 2008) with cross-correlation of radius 2 and 100, 50 and 20 iterations per level.

    Args:
        strength: sigma of the Gaussian that smooths the updates.
    """
    import ants

    fixed, moving = (ants.from_numpy(np.ascontiguousarray(volume.T)) for volume in _volumes(pair))
    found = ants.registration(
        fixed,
        moving,
        "SyNOnly",
        initial_transform="Identity",
        syn_metric="CC",
        syn_sampling=2,
        reg_iterations=(100, 50, 20),
        flow_sigma=3.0 if strength is None else strength,
        singleprecision=True,
    )
    warps = [path for path in found["fwdtransforms"] if path.endswith(".nii.gz")]
    vectors = sitk.GetArrayFromImage(sitk.ReadImage(warps[0]))
    return _field(pair, np.moveaxis(vectors[..., ::-1], -1, 0))


def package(pair: DescribedPair, strength: float | None) -> Field:
    """The convexAdam package 0.2.0 with MIND and the settings of the reference measurements."""
    from convexAdam.convex_adam_MIND import convex_adam_pt

    fixed, moving = _filled(pair)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on defaults of torch that it relies on
        found = convex_adam_pt(
            fixed,
            moving,
            mind_r=1,
            mind_d=2,
            lambda_weight=PACKAGE_LAMBDA,
            **PACKAGE,
            selected_niter=80,
            selected_smooth=0,
            ic=True,
            dtype=torch.float32,
            verbose=False,
            device=torch.device("cpu"),
        )
    return _cropped(pair, torch.from_numpy(np.moveaxis(np.asarray(found), -1, 0)))


def like_package(pair: DescribedPair, strength: float | None) -> Field:
    """Our solver with the package's conventions, on the same MIND."""
    fixed, moving = (mind(volume, 1, (2, 2, 2)) for volume in _filled(pair))
    settings = SolverSettings.convexadam(**PACKAGE, regularisation=PACKAGE_LAMBDA)
    return _cropped(pair, register_features(fixed, moving, (1.0, 1.0, 1.0), settings).displacement_voxels)


CLASSICAL = {
    "none": Classical("no deformation", stay),
    "rigid": Classical("rigid by mutual information (SimpleITK)", stay, init="rigid"),
    "affine": Classical("affine by mutual information (SimpleITK)", stay, init="affine"),
    "demons": Classical("diffeomorphic demons (SimpleITK)", demons, (0.7, 1.0, 1.4, 2.0, 2.8)),
    "syn": Classical(
        "SyN, cross-correlation (ANTs)",
        syn,
        (1.5, 2.1, 3.0, 4.2),
        module="ants",
        install="pip install 'nnssl-ext[ants]'",
    ),
    "convexadam": Classical(
        "MIND in the convexAdam package, λ 1.25",
        package,
        module="convexAdam.convex_adam_MIND",
        install="pip install convexAdam",
    ),
    "convexadam-ours": Classical("MIND in our solver as the package does it, λ 1.25", like_package),
}


def _volumes(pair: DescribedPair) -> tuple[Volume, Volume]:
    fixed, moving = (maps[0].cpu().numpy() for maps in pair.features)
    return fixed, moving


def _filled(pair: DescribedPair) -> list[torch.Tensor]:
    """Both volumes, filled up behind with their border."""
    more = [-length % CELLS for length in pair.grid.size]
    return [F.pad(maps[None].cpu(), (0, more[2], 0, more[1], 0, more[0]), "replicate")[0, 0] for maps in pair.features]


def _cropped(pair: DescribedPair, displacement: torch.Tensor) -> Field:
    z, y, x = pair.grid.size
    return Field(displacement[:, :z, :y, :x].float().contiguous(), pair.grid.spacing)


def _field(pair: DescribedPair, displacement: np.ndarray) -> Field:
    return Field(torch.from_numpy(np.ascontiguousarray(displacement, dtype=np.float32)), pair.grid.spacing)
