"""Dense hierarchical representations (Kats et al., ISBI 2024, arXiv:2401.06473): vox2vec with three changes, each of which can be left out.

In vox2vec (arXiv:2307.14725) the coarse levels, which have most channels, decide what a voxel's vector says. Here every level is
projected to the same width (`balance`); crops are corrupted locally, by shuffled blocks, tone curves and cuboids of noise, instead
of windowed (`local`); and from its finest map the network restores the crop as it was (`restoration`):
``loss = NT-Xent + 10 MSE``. Encoder and decoder are trained. Without the three it is vox2vec.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from nnssl_ext.contracts import Backbone, PretrainPlan
from nnssl_ext.data.intensity_scale import ScaleSettings
from nnssl_ext.engine.settings import OptimSettings
from nnssl_ext.errors import NnsslError
from nnssl_ext.geometry.matching import inside_case
from nnssl_ext.networks.dense_contrast import Contrast, ContrastSettings, DenseContrast
from nnssl_ext.objectives.reconstruction import masked_error
from nnssl_ext.records import Step, View
from nnssl_ext.reports.feature_pca import pca_rgb
from nnssl_ext.trainers.pretraining.vox2vec import OPTIM, VOX2VEC, pairs_per_case, tiny_optim
from nnssl_ext.views.anchored_pairs import AnchoredPairs
from nnssl_ext.views.dense_recipes import LocalIntensity, WindowIntensity
from nnssl_ext.views.policies import SpatialSettings
from nnssl_ext.views.recipes import STILL, UNITS

HIERARCHICAL_DENSE = (
    "Kats et al. Self-supervised Learning of Dense Hierarchical Representations for Medical Image Segmentation. ISBI 2024. "
    "arXiv:2401.06473"
)
Balancing = Literal["trained", "frozen", "none"]
WINDOW = (-175.0, 250.0)
"""HU that are black and white in the paper's images."""


@dataclass(frozen=True)
class HierarchicalDenseSettings:
    """Settings of `HierarchicalDenseTrainer`; the defaults are the paper's and its released code's.

    The paper's ablation: ``balance="none"``, ``local=False`` and ``restoration=0``, singly and together; together, with all
    levels and vox2vec's scale, they are `Vox2VecTrainer`.

    Attributes:
        epochs, iterations: 500 x 100 optimiser steps.
        crop: voxels z, y, x; None = the plans' local crop.
        pairs: of crops per case.
        contrast: how voxels are compared; the five finest levels.
        balance: ``trained`` projections of all levels to one width; ``frozen`` random ones, as the released code has by
            mistake; ``none``.
        width: channels of each level after it.
        local: corrupt crops locally; off: vox2vec's filters, noise and windows.
        restoration: weight of the squared error of restoring the clean crop, of images on which black to white is 1; 0 = without.
            CT is cut to the paper's window for it.
        scale: what is body: -47.5 HU is 0.3 of the paper's window of [-175, 250] HU, as is its threshold for MR.
        spatial: turns and zooms of each crop; none in the paper.
        local_intensity, window_intensity: augmentations of each crop with and without `local`.
        optim: optimiser.
    """

    epochs: int = 500
    iterations: int = 100
    crop: tuple[int, int, int] | None = None
    pairs: int = 10
    contrast: ContrastSettings = field(default_factory=lambda: ContrastSettings(levels=5))
    balance: Balancing = "trained"
    width: int = 32
    local: bool = True
    restoration: float = 10.0
    scale: ScaleSettings = field(default_factory=lambda: ScaleSettings(body_hu=-47.5, body_share=0.3))
    spatial: SpatialSettings = STILL
    local_intensity: LocalIntensity = field(default_factory=LocalIntensity)
    window_intensity: WindowIntensity = field(default_factory=WindowIntensity)
    optim: OptimSettings = OPTIM

    def __post_init__(self) -> None:
        if self.restoration > 0 and not self.contrast.decoder:
            raise NnsslError(
                "restoration needs the decoder's finest map", "set --restoration 0, or leave the decoder on"
            )

    @classmethod
    def for_plan(cls, plan: PretrainPlan) -> HierarchicalDenseSettings:
        """As `Vox2VecSettings.for_plan`."""
        pairs = pairs_per_case(plan)
        if plan.preset.endswith("Tiny"):
            contrast = ContrastSettings(voxels=256, levels=5)
            return cls(epochs=20, iterations=50, pairs=pairs, contrast=contrast, optim=tiny_optim())
        return cls(pairs=pairs)


class HierarchicalDenseTrainer(DenseContrast):
    """The method; see the module's head.

    Args:
        settings: what to do.
        backbone: what to train.
        plan: crop size, channels, and what intensities mean.
    """

    settings_type = HierarchicalDenseSettings
    grey_scale: Float[Tensor, "3 C 1 1 1"]
    citations = (HIERARCHICAL_DENSE, VOX2VEC)

    def __init__(self, settings: HierarchicalDenseSettings, backbone: Backbone, plan: PretrainPlan) -> None:
        width = None if settings.balance == "none" else settings.width
        super().__init__(backbone, settings.contrast, width, train_balance=settings.balance == "trained")
        self.settings = settings
        self.restore = nn.Conv3d(backbone.decoder_channels[0], plan.channels, 1) if settings.restoration else None
        self.register_buffer("grey_scale", _grey_scale(plan), persistent=False)
        self.view_policy = AnchoredPairs(
            settings.crop or plan.local_crop,
            settings.local_intensity if settings.local else settings.window_intensity,
            settings.scale,
            plan.hounsfield[0],
            settings.pairs,
            settings.spatial,
        )

    def forward(self, views: tuple[View, ...]) -> Step:
        """The contrast of all pairs, and the restoration of all crops."""
        found = self.contrast(views)
        if self.restore is None:
            return Step(found.loss, found.terms, found.watch)
        error = self._restoration_error(self.restore, found)
        parts = {"contrast": found.loss, "restoration": self.settings.restoration * error}
        terms = {"contrast": found.loss.detach(), "restoration": error.detach(), **found.terms}
        return Step(parts["contrast"] + parts["restoration"], terms, found.watch, parts)

    @torch.no_grad()
    def pictures(self, views: tuple[View, ...]) -> dict[str, Shaped[Tensor, "B _C Z Y X"]]:
        """A crop as it is and as corrupted, what is restored of it, and its finest level as colours."""
        view = views[0]
        assert view.clean is not None
        finest = self.levels(view.voxels)[1].levels[0]
        shown = {"crop": view.clean, "corrupted": view.voxels}
        if self.restore is not None:
            shown["restored"] = self.restore(finest).float()
        return {**shown, "features": pca_rgb([finest], [view.size])[0]}

    def _restoration_error(self, restore: nn.Module, found: Contrast) -> Float[Tensor, ""]:
        """Mean squared error over voxels inside the case, both views of all pairs, in units of the range from black to white."""
        clean, inside = [], []
        for view in (found.first, found.second):
            assert view.clean is not None
            clean.append(view.clean)
            inside.append(inside_case(view).expand_as(view.clean))
        black, white, width = self.grey_scale
        target = torch.cat(clean).clamp(black, white) / width
        weight = torch.cat(inside).to(target.dtype)
        return masked_error(restore(found.levels.levels[0]) / width, target, weight)


def _grey_scale(plan: PretrainPlan) -> Float[Tensor, "3 C 1 1 1"]:
    """What is black and what is white in units of the normalised image, and how far these are apart. Intensities that are not
    Hounsfield units know no bounds."""
    channels = []
    for scale in plan.hounsfield:
        if scale is None:
            channels.append((-math.inf, math.inf, UNITS))
        else:
            black, white = map(scale.normalised, WINDOW)
            channels.append((black, white, white - black))
    return torch.tensor(channels).T[..., None, None, None]
