"""What to draw from a case: sizes, places, augmentations and masks, decided before any voxel is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from nnssl_ext.contracts import ViewDraw
from nnssl_ext.geometry.affines import Affine, quarter_turns, view_to_case
from nnssl_ext.records import Case, Size
from nnssl_ext.views.masks import MaskSettings, draw_mask

ANISOTROPY = 3.0
"""Ratio of spacings beyond which rotation and zoom stay in the plane; nnU-Net's ANISO_THRESHOLD."""

FACTORS = ("brightness", "contrast", "gamma_inverted", "gamma")
"""Augmentations whose strength 1 changes nothing."""
SEEDED = ("random_convolutions", "histogram_shift", "bias_field", "noise", "cutout")
"""Augmentations that draw more than a strength, from a seed beside it."""

Triple = tuple[float, float, float]
Range = tuple[float, float]


@dataclass(frozen=True)
class SpatialSettings:
    """Flips, rotation and zoom; defaults are those of nnUNetTrainer (nnunetv2 2.8.1).

    Attributes:
        flip: probability per axis z, y, x.
        rot90: probability of a turn by 90, 180 or 270 degrees about z, y, x; only in planes where both the view has
            equal lengths and the case equal spacing (to 1 %). Off in nnU-Net.
        rotation: probability of a rotation, by up to `degrees` about each axis.
        degrees: largest angle, in mm space. About the axis of the thick slices only where spacing is anisotropic.
        zoom: probability of a zoom, the same for all axes (in the plane only where spacing is anisotropic).
        zoom_range: case voxels per view voxel; above 1 shows more of the case, smaller.
    """

    flip: Triple = (0.5, 0.5, 0.5)
    rot90: Triple = (0.0, 0.0, 0.0)
    rotation: float = 0.2
    degrees: float = 30.0
    zoom: float = 0.2
    zoom_range: Range = (0.7, 1.4)


@dataclass(frozen=True)
class IntensitySettings:
    """Intensity augmentations: a probability and a range of strengths each, in the order of application.

    Defaults are those of nnUNetTrainer (nnunetv2 2.8.1), except that a strength is shared by all channels and axes.

    Attributes:
        noise, noise_std: Gaussian noise, in units of the normalised intensity.
        blur, blur_sigma: Gaussian blur, in voxels.
        brightness, brightness_range: multiplication.
        contrast, contrast_range: stretch about the mean, clamped to the former range.
        low_resolution, low_resolution_scale: sampling on a coarser grid and back.
        gamma_inverted, gamma, gamma_range: power law on the negative and on the image; mean and std are kept.
        random_convolutions, random_convolutions_alpha: mixing with a random network's output; for shapes that survive a
            change of modality. Off and not in nnU-Net, as all that follow; see `nnssl_ext.views.corruptions`.
        histogram_shift, histogram_shift_extent: random monotone tone curve.
        bias_field, bias_field_extent: smooth multiplicative field. 0.5: TorchIO.
        sharpen, sharpen_amount: unsharp masking.
        filter: probability of either blur or sharpening, each as often; None: of both, each by its own probability.
        shift, shift_range: addition, in units of the normalised intensity.
        power_law, power_law_range: `gamma` that keeps neither mean nor std, its exponent uniform in the range. 0.5 to 2: 3DINO.
        gibbs, gibbs_extent: ringing; 0.42 keeps exactly the frequencies below Nyquist's in every direction.
        cutout, cutout_share: boxes replaced by the mean. At most 0.3: Swin UNETR's pretraining.
    """

    noise: float = 0.1
    noise_std: Range = (0.0, 0.1)
    blur: float = 0.2
    blur_sigma: Range = (0.5, 1.0)
    brightness: float = 0.15
    brightness_range: Range = (0.75, 1.25)
    contrast: float = 0.15
    contrast_range: Range = (0.75, 1.25)
    low_resolution: float = 0.25
    low_resolution_scale: Range = (0.5, 1.0)
    gamma_inverted: float = 0.1
    gamma: float = 0.3
    gamma_range: Range = (0.7, 1.5)
    random_convolutions: float = 0.0
    random_convolutions_alpha: Range = (0.0, 1.0)
    histogram_shift: float = 0.0
    histogram_shift_extent: Range = (0.0, 1.0)
    bias_field: float = 0.0
    bias_field_extent: Range = (0.0, 0.5)
    sharpen: float = 0.0
    sharpen_amount: Range = (0.5, 2.0)
    filter: float | None = None
    shift: float = 0.0
    shift_range: Range = (-0.5, 0.5)
    power_law: float = 0.0
    power_law_range: Range = (0.5, 2.0)
    gibbs: float = 0.0
    gibbs_extent: Range = (0.0, 0.6)
    cutout: float = 0.0
    cutout_share: Range = (0.0, 0.3)


@dataclass(frozen=True)
class SingleView:
    """One view per case, at a uniformly random place.

    Attributes:
        size: voxels along z, y, x. The view lies inside the case on each axis where it fits, else around its middle,
            padded with zeros.
        mask: what to hide, or None.
        spatial: flips, rotation and zoom.
        intensity: intensity augmentations, or None.
    """

    size: Size
    mask: MaskSettings | None = None
    spatial: SpatialSettings = field(default_factory=SpatialSettings)
    intensity: IntensitySettings | None = None

    def draw(self, case: Case, rng: np.random.Generator, quantile: float) -> tuple[ViewDraw, ...]:
        affine = draw_affine(case, self.size, self.spatial, rng)
        intensity = {} if self.intensity is None else draw_intensity(self.intensity, rng)
        mask = None if self.mask is None else draw_mask(self.size, self.mask, rng)
        return (ViewDraw(self.size, affine, intensity, mask),)


@dataclass(frozen=True)
class Pose:
    """How a view is turned about its centre; arguments of `nnssl_ext.geometry.affines.view_to_case`.

    Attributes:
        flips: axes that run backwards.
        quarters: a turn by right angles, or None.
        degrees: angles about z, y, x.
        zoom: case voxels per view voxel along each axis.
    """

    flips: np.ndarray
    quarters: np.ndarray | None
    degrees: np.ndarray
    zoom: np.ndarray

    def affine(self, case: Case, size: Size, centre: np.ndarray, zoom: np.ndarray | float = 1.0) -> Affine:
        """View voxel -> case voxel for a view around this case voxel, zoomed further along the case's axes."""
        return view_to_case(
            size,
            centre,
            flips=self.flips,
            quarters=self.quarters,
            degrees=self.degrees,
            zoom=self.zoom * zoom,
            spacing=case.spacing,
        )


def draw_pose(case: Case, size: Size, settings: SpatialSettings, rng: np.random.Generator) -> Pose:
    """Flips, turns and zoom for a view of this size."""
    turned, zoomed = _free_axes(case.spacing)
    flips = rng.random(3) < settings.flip
    degrees, zoom = np.zeros(3), np.ones(3)
    if rng.random() < settings.rotation:
        degrees = np.where(turned, rng.uniform(-settings.degrees, settings.degrees, 3), 0.0)
    if rng.random() < settings.zoom:
        zoom[zoomed] = rng.uniform(*settings.zoom_range)
    quarters = None
    if any(settings.rot90):
        wanted = _exchangeable(case.spacing, size) & (rng.random(3) < settings.rot90)
        counts = np.where(wanted, rng.integers(1, 4, 3), 0).tolist()
        quarters = _quarter_turns(*counts) if any(counts) else None
    return Pose(flips, quarters, degrees, zoom)


@lru_cache
def _free_axes(spacing: Triple) -> tuple[np.ndarray, np.ndarray]:
    """Axes about which to turn, and axes along which to zoom: not out of the plane of thick slices."""
    mm = np.asarray(spacing)
    if mm.max() / mm.min() > ANISOTROPY:
        return mm == mm.max(), mm != mm.max()
    return np.ones(3, bool), np.ones(3, bool)


@lru_cache
def _exchangeable(spacing: Triple, size: Size) -> np.ndarray:
    """Axes about which a quarter turn exchanges two axes of equal length and spacing."""
    planes = ((1, 2), (0, 2), (0, 1))
    return np.array([size[a] == size[b] and abs(spacing[a] / spacing[b] - 1) < 0.01 for a, b in planes])


@lru_cache
def _quarter_turns(z: int, y: int, x: int) -> np.ndarray:
    return quarter_turns((z, y, x))


def draw_affine(case: Case, size: Size, settings: SpatialSettings, rng: np.random.Generator) -> Affine:
    """A place, flips, turns and zoom for a view of this size: view voxel -> case voxel."""
    pose = draw_pose(case, size, settings, rng)
    return pose.affine(case, size, draw_centre(case.shape, size, pose.zoom, rng))


def draw_centre(shape: Size, size: Size, zoom: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The centre of a view, uniform over the places that keep it inside the volume, whole voxels unless zoomed.

    Along an axis where the (zoomed) view does not fit it covers the whole axis, in the middle.
    """
    extent = np.asarray(size) * zoom
    room = np.asarray(shape) - extent
    whole = extent == np.asarray(size)
    lower = np.where(whole, np.floor(rng.random(3) * (room + 1)), rng.random(3) * room)
    lower = np.where(room >= 0, lower, np.where(whole, room // 2, room / 2))
    return lower + (extent - 1) / 2


def draw_intensity(settings: IntensitySettings, rng: np.random.Generator) -> dict[str, float]:
    """Augmentation -> strength for one view, in the order of application; what is not drawn is not applied."""
    ranges: dict[str, Range] = {
        "random_convolutions": settings.random_convolutions_alpha,
        "histogram_shift": settings.histogram_shift_extent,
        "bias_field": settings.bias_field_extent,
        "noise": settings.noise_std,
        "blur": settings.blur_sigma,
        "sharpen": settings.sharpen_amount,
        "brightness": settings.brightness_range,
        "shift": settings.shift_range,
        "contrast": settings.contrast_range,
        "low_resolution": settings.low_resolution_scale,
        "gamma_inverted": settings.gamma_range,
        "gamma": settings.gamma_range,
        "power_law": settings.power_law_range,
        "gibbs": settings.gibbs_extent,
        "cutout": settings.cutout_share,
    }
    chances: dict[str, float] = {name: getattr(settings, name) for name in ranges}
    if settings.filter is not None:
        filtered, blurred = rng.random() < settings.filter, rng.random() < 0.5
        chances |= {"blur": float(filtered and blurred), "sharpen": float(filtered and not blurred)}
    drawn: dict[str, float] = {}
    for name, (low, high) in ranges.items():
        if not chances[name] or rng.random() >= chances[name]:
            continue
        if name in FACTORS and low < 1.0 < high:  # below and above 1 equally often
            low, high = (low, 1.0) if rng.random() < 0.5 else (1.0, high)
        drawn[name] = float(rng.uniform(low, high))
        if name in SEEDED:
            drawn[f"{name}_seed"] = float(rng.integers(2**31))
    return drawn
