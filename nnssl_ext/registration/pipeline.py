"""From two scans to a displacement field between them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import get_args

import numpy as np
import SimpleITK as sitk
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from nnssl_ext.errors import NnsslError
from nnssl_ext.registration.affine import Start, initial_transform
from nnssl_ext.registration.extraction import ExtractionSettings
from nnssl_ext.registration.features import FeatureSource, pair_features, working_spacing
from nnssl_ext.registration.frame import Frame, frame_of
from nnssl_ext.registration.images import Grid, Scan, Spacing, common_grid, finest_cubes, place, view_field
from nnssl_ext.registration.projection import COMPONENTS
from nnssl_ext.registration.solver import Field, SolverSettings, register_features
from nnssl_ext.reports.machine import peak_memory

FAR_SPACING = 2.0
"""A scan whose spacing differs by more than this factor from a network's shows details the network does not know, or lacks
those it knows (our choice)."""


@dataclass(frozen=True)
class PairSettings:
    """How a pair is registered.

    Attributes:
        init: where the search starts: none trusts the headers, centre aligns the foregrounds' centres of mass, rigid and affine
            go on by mutual information, auto is none, or centre where the fields of view hardly meet; else a transform file.
        spacing: mm of the common grid along z, y, x; None: what the features' networks were trained at, else cubes as fine as
            the fixed scan's finest axis, or larger ones where the features would take more than `features.memory_gib`.
        weights: of the features, where several are fused; None: equal.
        features: how maps are read from networks (for `features.load_features`).
        solver: of the deformation.
    """

    init: str = "auto"
    spacing: Spacing | None = None
    weights: tuple[float, ...] | None = None
    features: ExtractionSettings = field(default_factory=ExtractionSettings)
    solver: SolverSettings = field(default_factory=SolverSettings)

    def __post_init__(self) -> None:
        if self.spacing is not None and not min(self.spacing) > 0:
            told = " ".join(f"{value:g}" for value in self.spacing)
            raise NnsslError(f"--spacing {told}", "give three numbers of mm above 0, or leave it out")
        if not self.features.memory_gib > 0:
            raise NnsslError(f"--features.memory_gib {self.features.memory_gib:g}", "give a number above 0")


@dataclass(frozen=True)
class DescribedPair:
    """Two scans on their common grid, ready for any solver. Voxels are those of `frame`.

    Attributes:
        fixed, moving: the scans, as they were loaded.
        initial: world point of the fixed scan -> world point of the moving scan, applied before the deformation.
        initial_note: one sentence on where `initial` comes from.
        frame: what the common grid's axes are.
        grid: the common grid, in `frame`.
        features: of both scans, at every voxel of it.
        foreground: of both scans.
        counted: what may be compared, or None for every voxel.
        seconds: per stage.
        memory_gib: peak per stage: of the device on CUDA, else of the process so far.
        notes: what deserves attention, one sentence each.
    """

    fixed: Scan
    moving: Scan
    initial: sitk.Transform
    initial_note: str
    frame: Frame
    grid: Grid
    features: tuple[Float[Tensor, "C Z Y X"], Float[Tensor, "C Z Y X"]]
    foreground: tuple[Bool[np.ndarray, "Z Y X"], Bool[np.ndarray, "Z Y X"]]
    counted: tuple[Bool[Tensor, "Z Y X"] | None, Bool[Tensor, "Z Y X"] | None]
    seconds: dict[str, float]
    memory_gib: dict[str, float]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Registration:
    """A registered pair: `DescribedPair` and the deformation found on its grid, all in the world and in the order of axes in
    which scans are loaded.

    Attributes:
        field: the deformation on the common grid; ``warped(x) = moving(initial(x + d(x)))``.
        fixed_mask: where the fixed scan's foreground is, on the common grid.
        features: first channels of both scans' features, for pictures.
    """

    fixed: Scan
    moving: Scan
    initial: sitk.Transform
    initial_note: str
    grid: Grid
    field: Field
    fixed_mask: Bool[np.ndarray, "Z Y X"]
    features: tuple[Float[Tensor, "K Z Y X"], Float[Tensor, "K Z Y X"]]
    seconds: dict[str, float]
    memory_gib: dict[str, float]
    notes: tuple[str, ...]


def register_pair(
    fixed: Scan,
    moving: Scan,
    sources: Sequence[FeatureSource],
    settings: PairSettings = PairSettings(),
    device: torch.device | str = "cpu",
) -> Registration:
    """Register two scans.

    Raises:
        NnsslError: fields of view that do not meet, no foreground in common, networks of different spacings, or no start.
    """
    pair = describe_pair(fixed, moving, sources, settings, device)
    return deform_pair(pair, lambda: solve_pair(pair, settings.solver))


def describe_pair(
    fixed: Scan,
    moving: Scan,
    sources: Sequence[FeatureSource],
    settings: PairSettings = PairSettings(),
    device: torch.device | str = "cpu",
) -> DescribedPair:
    """Bring two scans onto a common grid and describe them there; what `register_pair` does before it deforms."""
    device = torch.device(device)
    seconds: dict[str, float] = {}
    memory: dict[str, float] = {}
    with _measured("start", device, seconds, memory):
        frame = frame_of(fixed)
        scans = frame.scan(fixed), frame.scan(moving)
        start, initial_note = initial_transform(*scans, settings.init)
        if settings.init in get_args(Start):
            initial = frame.outward(start)
        else:  # it was read from a file, and is between world points
            initial, start = start, frame.inward(start)
        grid, grid_notes = _choose_grid(*scans, start, sources, settings, frame)
        transforms = (sitk.Transform(3, sitk.sitkIdentity), start)
        views = [view_field(scan.image, grid, to) for scan, to in zip(scans, transforms, strict=True)]
        natural = [scan.foreground() for scan in scans]
        masks, counted = [], []
        for scan, to, view, foreground in zip(scans, transforms, views, natural, strict=True):
            inside = _placed(scan, foreground.astype(np.uint8), grid, to, labels=True) > 0
            masks.append(_foreground(inside & view, scan))
            counted.append(inside & view if scan.mask is not None else view)
    with _measured("features", device, seconds, memory):
        tensors = [torch.from_numpy(mask).to(device) for mask in masks]
        volumes = []
        for source in sources:
            fixed_volume, moving_volume = (
                _placed(scan, source.normalise(scan.voxels, foreground), grid, to)
                for scan, to, foreground in zip(scans, transforms, natural, strict=True)
            )
            volumes.append((fixed_volume, moving_volume))
        described = pair_features(
            sources, volumes, grid.spacing, tensors[0], tensors[1], settings.weights, turn=frame.turn
        )
    weights = [None if mask.all() else torch.from_numpy(mask).to(device) for mask in counted]
    spacing = frame.turn.lengths_back(grid.spacing)
    about = [note for source in sources for note in (*source.notes, *_spacing_notes(source, fixed, moving, spacing))]
    return DescribedPair(
        fixed,
        moving,
        initial,
        initial_note,
        frame,
        grid,
        described,
        (masks[0], masks[1]),
        (weights[0], weights[1]),
        seconds,
        memory,
        (*about, *grid_notes),
    )


def solve_pair(pair: DescribedPair, settings: SolverSettings) -> Field:
    """The deformation that our solver finds; smoothness is that of the fixed scan's foreground, as `outputs.measure` tells."""
    foreground = torch.from_numpy(pair.foreground[0]).to(pair.features[0].device)
    return register_features(*pair.features, pair.grid.spacing, settings, *pair.counted, foreground)


def deform_pair(pair: DescribedPair, solve: Callable[[], Field]) -> Registration:
    """What `solve` finds for a described pair, with its time and memory."""
    seconds, memory = dict(pair.seconds), dict(pair.memory_gib)
    with _measured("solver", pair.features[0].device, seconds, memory):
        found = solve()
    seconds |= {f"solver_{stage}": value for stage, value in found.seconds.items()}
    turn = pair.frame.turn
    few = tuple(turn.back(maps[:12].cpu()) for maps in pair.features)
    return Registration(
        pair.fixed,
        pair.moving,
        pair.initial,
        pair.initial_note,
        pair.frame.grid_back(pair.grid),
        pair.frame.field_back(found),
        turn.back(torch.from_numpy(pair.foreground[0])).numpy(),
        (few[0], few[1]),
        seconds,
        memory,
        (*pair.notes, *_lost(found, pair.foreground[0])),
    )


def _lost(field: Field, foreground: Bool[np.ndarray, "Z Y X"]) -> list[str]:
    """A note where most of the fixed foreground was moved out of the common grid, where nothing can bring it back."""
    displacement = field.displacement_voxels
    mask = torch.from_numpy(foreground).to(displacement.device)
    places = mask.nonzero().T + displacement[:, mask]
    lengths = torch.tensor(mask.shape, device=mask.device).view(3, 1)
    share = float(((places >= -0.5) & (places <= lengths - 0.5)).all(dim=0).float().mean())
    if share >= 0.5:
        return []
    gone = f"{1 - share:.0%} of the fixed scan's foreground was moved out of view: the deformation cannot be trusted"
    return [f"{gone}; give scans that show more around it, or smooth more (--solver.regularisation)"]


@contextmanager
def _measured(stage: str, device: torch.device, seconds: dict[str, float], memory: dict[str, float]) -> Iterator[None]:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    yield
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if (peak := peak_memory(device)) is not None:
        memory[stage] = peak / 2**30
    seconds[stage] = time.perf_counter() - started


def _choose_grid(
    fixed: Scan,
    moving: Scan,
    initial: sitk.Transform,
    sources: Sequence[FeatureSource],
    settings: PairSettings,
    frame: Frame,
) -> tuple[Grid, list[str]]:
    """The common grid, and what deserves attention about its size: float32 features of both scans, `COMPONENTS` per source,
    should fit `features.memory_gib`. What else is in memory comes to 1.3 times as much with MIND alone (measured)."""
    allowed = settings.features.memory_gib
    asked = settings.spacing or working_spacing(sources)
    first = spacing = frame.turn.lengths_there(asked) if asked else finest_cubes(fixed)
    while True:
        # margin: displacements may point as far as the solver searches
        grid = common_grid(fixed, moving, initial, spacing, settings.solver.reach_mm(spacing))
        needed = 2 * 4 * COMPONENTS * len(sources) * math.prod(grid.size) / 2**30
        if needed <= allowed or asked:
            break
        factor = max((needed / allowed) ** (1 / 3), 1.01)  # at least a step: sizes are rounded up
        spacing = (spacing[0] * factor, spacing[1] * factor, spacing[2] * factor)
    notes = []
    if needed > allowed:
        notes.append(
            f"the features of both scans on the common grid of {frame.grid_back(grid)} take about {needed:.3g} GiB, more than "
            f"--features.memory_gib {allowed:g}; a coarser --spacing takes less"
        )
    elif spacing != first:
        notes.append(
            f"the common grid has voxels of {_mm(spacing)} instead of {_mm(first)}, so that the features of both scans fit "
            f"{allowed:g} GiB; raise --features.memory_gib where there is more memory"
        )
    return grid, notes


def _placed(
    scan: Scan, array: Shaped[np.ndarray, "Z Y X"], grid: Grid, transform: sitk.Transform, labels: bool = False
) -> Shaped[np.ndarray, "z y x"]:
    """An array on a scan's grid, brought onto the common grid."""
    return place(scan.grid.image(array), grid, transform, labels)


def _foreground(mask: Bool[np.ndarray, "Z Y X"], scan: Scan) -> Bool[np.ndarray, "Z Y X"]:
    if not mask.any():
        raise NnsslError(
            f"{scan.path}: none of its foreground lies on the common grid",
            "check the mask and the headers, or let the start be found (--init centre)",
        )
    return mask


def _spacing_notes(source: FeatureSource, fixed: Scan, moving: Scan, spacing: Spacing) -> list[str]:
    """Where a network sees voxels of another size than in its training."""
    if source.spacing is None:
        return []
    found = []
    if not np.allclose(spacing, source.spacing, rtol=1e-3):
        found.append(f"{source.name} was trained at {_mm(source.spacing)}, the common grid has {_mm(spacing)}")
    for scan in (fixed, moving):
        ratio = np.array(scan.grid.spacing) / source.spacing
        if max(ratio.max(), 1 / ratio.min()) > FAR_SPACING:
            found.append(
                f"{scan.path.name} has voxels of {_mm(scan.grid.spacing)}, outside the range of {source.name}, which was "
                f"trained at {_mm(source.spacing)}: features may be poor"
            )
    return found


def _mm(spacing: Spacing) -> str:
    return "x".join(f"{value:.3g}" for value in spacing) + " mm"
