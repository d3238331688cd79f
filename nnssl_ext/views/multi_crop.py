"""Multi-crop: some large and many small views of one neighbourhood of a case.

Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", arXiv:2006.09882; in 3D as in
Xu et al., "3DINO", arXiv:2501.11755: the share of the in-plane area and the share of the slices are drawn on their own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from nnssl_ext.contracts import ViewDraw
from nnssl_ext.errors import NnsslError
from nnssl_ext.records import Case, Size
from nnssl_ext.views.masks import TokenMaskSettings, draw_token_masks
from nnssl_ext.views.policies import IntensitySettings, Range, SpatialSettings, draw_intensity, draw_pose
from nnssl_ext.views.recipes import DINO_SPATIAL


@dataclass(frozen=True)
class CropScale:
    """How much of the field of view a crop shows. Shares of lengths in mm; the same in voxels.

    Attributes:
        area: share of the in-plane area. The slice axis is the one with the largest spacing, the first of equals.
        length: share of the length along the slice axis.
        aspect: ratio of the two in-plane zooms, drawn log-uniformly: 1 keeps the proportions in mm.
    """

    area: Range
    length: Range
    aspect: Range = (0.9, 1 / 0.9)

    def __post_init__(self) -> None:
        for name, (low, high), limit in (
            ("area", self.area, 1.0),
            ("length", self.length, 1.0),
            ("aspect", self.aspect, np.inf),
        ):
            if not 0 < low <= high <= limit:
                raise NnsslError(f"crop scale {name} ({low}, {high})", f"give a range with 0 < low <= high <= {limit}")


GLOBAL_SCALE = CropScale(area=(0.48, 1.0), length=(0.5, 1.0))
LOCAL_SCALE = CropScale(area=(0.16, 0.48), length=(0.2, 0.5))
"""3DINO's: mean volume 0.54 and 0.11 of the case."""


@dataclass(frozen=True)
class MultiCrop:
    """Global views, then local views, all inside one field of view.

    Attributes:
        global_size, local_size: voxels along z, y, x.
        globals_, locals_: how many. 2 and 8: DINOv2, 3DINO.
        global_scale, local_scale: how much of the field of view they show; realised by resampling to the size.
        field_of_view: longest neighbourhood that the views of a case are cut from, in lengths of the global view. A
            smaller case is taken whole, as 3DINO does with every case; in a larger one the place is random. 1.5 (our
            choice) keeps voxels near the spacing that fine-tuning uses, views overlapping, and the read bounded.
        mask: masks for the global views, or None. Local views are never masked.
        spatial: flips and turns, and a further rotation or zoom if asked for. Flips and turns with p 0.3: 3DINO.
        intensity: per view, the last for all further ones, so e.g. first global, second global, locals; () for none.
    """

    global_size: Size
    local_size: Size
    globals_: int = 2
    locals_: int = 8
    global_scale: CropScale = GLOBAL_SCALE
    local_scale: CropScale = LOCAL_SCALE
    field_of_view: float = 1.5
    mask: TokenMaskSettings | None = None
    spatial: SpatialSettings = DINO_SPATIAL
    intensity: tuple[IntensitySettings | None, ...] = ()

    def draw(self, case: Case, rng: np.random.Generator, quantile: float) -> tuple[ViewDraw, ...]:
        shape = np.asarray(case.shape, float)
        field_shape = np.minimum(shape, self.field_of_view * np.asarray(self.global_size))
        corner = rng.random(3) * (shape - field_shape)
        views = []
        for number in range(self.globals_ + self.locals_):
            globally = number < self.globals_
            size, scale = (self.global_size, self.global_scale) if globally else (self.local_size, self.local_scale)
            box = draw_box(field_shape, size, case.spacing, scale, rng)
            centre = corner + draw_lower(field_shape, box, size, rng) + (box - 1) / 2
            pose = draw_pose(case, size, self.spatial, rng)
            affine = pose.affine(case, size, centre, zoom=box / size)
            chosen = self.intensity[min(number, len(self.intensity) - 1)] if self.intensity else None
            views.append(ViewDraw(size, affine, {} if chosen is None else draw_intensity(chosen, rng)))
        if self.mask is not None:
            masks = draw_token_masks(self.global_size, self.globals_, self.mask, rng, quantile)
            views[: self.globals_] = [replace(view, mask=mask) for view, mask in zip(views, masks, strict=False)]
        return tuple(views)


def draw_lower(field_shape: np.ndarray, box: np.ndarray, size: Size, rng: np.random.Generator) -> np.ndarray:
    """Where a view's box begins in the field, uniformly, but in the middle where there is no room.

    Enlarged views keep off the border by what puts the centres of their outermost voxels, which are smaller than the case's,
    between centres of the case's voxels: beyond, interpolation would mix in the padding.
    """
    margin = np.maximum(0, (1 - box / size) / 2)
    room = field_shape - box - 2 * margin
    return np.where(room > 0, margin + rng.random(3) * room, (field_shape - box) / 2)


def draw_box(
    field_shape: np.ndarray, size: Size, spacing: tuple[float, float, float], scale: CropScale, rng: np.random.Generator
) -> np.ndarray:
    """Voxels (not necessarily whole) along z, y, x that a view of this size shows.

    Where the field is too narrow for the drawn area in the drawn aspect, the area is kept and the aspect gives way.
    """
    box = np.empty(3)
    slices = int(np.argmax(spacing))
    first, second = (axis for axis in range(3) if axis != slices)
    box[slices] = rng.uniform(*scale.length) * field_shape[slices]
    area = rng.uniform(*scale.area) * field_shape[first] * field_shape[second]
    stretch = np.exp(rng.uniform(*np.log(scale.aspect)))
    edge = np.sqrt(area * stretch * size[first] / size[second])
    box[first] = np.clip(edge, area / field_shape[second], field_shape[first])
    box[second] = min(area / box[first], field_shape[second])
    return box
