"""What self-distillation methods let users say about their crops and masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from nnssl_ext.contracts import PretrainPlan
from nnssl_ext.errors import NnsslError
from nnssl_ext.records import Size
from nnssl_ext.views.masks import TokenMaskSettings
from nnssl_ext.views.multi_crop import GLOBAL_SCALE, LOCAL_SCALE, CropScale, MultiCrop
from nnssl_ext.views.policies import IntensitySettings, SpatialSettings
from nnssl_ext.views.recipes import DINO_INTENSITY, DINO_MILD_INTENSITY, DINO_SPATIAL, STILL

SMALL_GLOBAL, SMALL_LOCAL = 24, 12
"""Voxels; with tokens of 4 that makes 216 and 27 tokens, 3DINO's numbers. Other tokens round them up to whole ones."""


@dataclass(frozen=True)
class CropSettings:
    """Crops, masks and augmentations of a self-distillation method; the defaults are 3DINO's.

    Attributes:
        global_crop, local_crop: voxels z, y, x; None = the plans'.
        global_views, local_views: how many of each.
        global_scale, local_scale: what shares of the field of view they show.
        mask_share: share of the global crops in which tokens are hidden.
        mask_ratio: range of the share of tokens hidden there.
        mask_shape: hide ``random`` tokens or ``block`` after block of them.
        spatial: flips and right-angled turns; the scale of a crop already zooms.
        first_intensity, second_intensity, local_intensity: augmentations of the first global crop, of further ones, and of
            the local ones.
    """

    global_crop: tuple[int, int, int] | None = None
    local_crop: tuple[int, int, int] | None = None
    global_views: int = 2
    local_views: int = 8
    global_scale: CropScale = GLOBAL_SCALE
    local_scale: CropScale = LOCAL_SCALE
    mask_share: float = 0.5
    mask_ratio: tuple[float, float] = (0.2, 0.75)
    mask_shape: Literal["random", "block"] = "random"
    spatial: SpatialSettings = DINO_SPATIAL
    first_intensity: IntensitySettings = DINO_INTENSITY[0]
    second_intensity: IntensitySettings = DINO_INTENSITY[1]
    local_intensity: IntensitySettings = DINO_INTENSITY[2]

    def __post_init__(self) -> None:
        if self.global_views < 1 or self.local_views < 0 or self.global_views + self.local_views < 2:
            raise NnsslError(
                f"{self.global_views} global and {self.local_views} local crops give no pair to compare",
                "use at least 2 global crops, or 1 and some local ones",
            )

    @classmethod
    def small(cls, plan: PretrainPlan, **changes: Any) -> CropSettings:
        """Crops for minutes on a CPU, no larger than the plans', and so that two crops of a case have something in common that
        other cases have not, where all cases show one organ: no flips and turns, larger shares, fewer and larger local crops,
        and of 3DINO's augmentations blur, sharpening and noise. With 3DINO's own, DINO's teacher became uniform on
        hippocampus; ``docs/views.md`` has the correlations between views."""
        tokens = plan.token_size or (1, 1, 1)

        def at_most(edge: int, crop: Size) -> Size:
            z, y, x = (min(-(-edge // token) * token, most) for token, most in zip(tokens, crop, strict=True))
            return z, y, x

        global_crop, local_crop = at_most(SMALL_GLOBAL, plan.global_crop), at_most(SMALL_LOCAL, plan.local_crop)
        first, second, local = DINO_MILD_INTENSITY
        return cls(
            global_crop=global_crop,
            local_crop=local_crop,
            local_views=4,
            global_scale=CropScale(area=(0.7, 1.0), length=(0.7, 1.0)),
            local_scale=CropScale(area=(0.5, 0.9), length=(0.5, 0.9)),
            spatial=STILL,
            first_intensity=first,
            second_intensity=second,
            local_intensity=local,
            **changes,
        )

    def policy(self, plan: PretrainPlan, cell: Size | None) -> MultiCrop:
        """What to draw from a case.

        Args:
            plan: gives the sizes that are not set here.
            cell: voxels that are hidden together, or None for no masks.
        """
        mask = None if cell is None else TokenMaskSettings(cell, self.mask_share, self.mask_ratio, self.mask_shape)
        further = [self.second_intensity] * (self.global_views - 1)
        return MultiCrop(
            global_size=self.global_crop or plan.global_crop,
            local_size=self.local_crop or plan.local_crop,
            globals_=self.global_views,
            locals_=self.local_views,
            global_scale=self.global_scale,
            local_scale=self.local_scale,
            mask=mask,
            spatial=self.spatial,
            intensity=(self.first_intensity, *further, self.local_intensity),
        )
