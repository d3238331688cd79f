"""vox2vec: contrast between voxels (Goncharov et al., MICCAI 2023, arXiv:2307.14725).

Pairs of crops around a common point of the body show some voxels twice, differently windowed, filtered and noisy. What a
U-shaped network says about a voxel on all its levels is one vector; projected, the two vectors of a voxel should be nearer to each
other than to those of all other sampled voxels of the case (NT-Xent). Encoder and decoder are trained.

On ResEnc the levels are the decoder's maps and the bottleneck, with the network's own instance norm instead of the paper's batch
norm; on Primus the patch decoder's maps and the tokens. Views may also be turned and zoomed: what corresponds follows from them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Shaped
from torch import Tensor

from nnssl_ext.contracts import Backbone, PretrainPlan
from nnssl_ext.data.intensity_scale import ScaleSettings
from nnssl_ext.engine.settings import OptimSettings
from nnssl_ext.networks.dense_contrast import ContrastSettings, DenseContrast
from nnssl_ext.records import Step, View
from nnssl_ext.reports.feature_pca import pca_rgb
from nnssl_ext.views.anchored_pairs import AnchoredPairs
from nnssl_ext.views.dense_recipes import WindowIntensity
from nnssl_ext.views.policies import SpatialSettings
from nnssl_ext.views.recipes import STILL

VOX2VEC = (
    "Goncharov et al. vox2vec: A Framework for Self-supervised Contrastive Learning of Voxel-level Representations in Medical "
    "Images. MICCAI 2023. arXiv:2307.14725"
)
OPTIM = OptimSettings(lr=3e-4, weight_decay=0.0, betas=(0.9, 0.999), schedule="constant", warmup=0.0, clip=1.0)
"""Adam at a constant rate, the released code's."""


@dataclass(frozen=True)
class Vox2VecSettings:
    """Settings of `Vox2VecTrainer`; the defaults are those of the released code.

    Attributes:
        epochs, iterations: 500 x 100 optimiser steps; the code trains open-ended, its successor (arXiv:2401.06473) so long.
        crop: voxels z, y, x; None = the plans' local crop (80 x 80 x 80 has the voxels of the code's 32 x 128 x 128).
        pairs: of crops per case.
        contrast: how voxels are compared.
        scale: what is body, and the window that images lie in.
        spatial: turns and zooms of each crop; none in the paper.
        intensity: augmentations of each crop.
        optim: optimiser.
    """

    epochs: int = 500
    iterations: int = 100
    crop: tuple[int, int, int] | None = None
    pairs: int = 10
    contrast: ContrastSettings = field(default_factory=ContrastSettings)
    scale: ScaleSettings = field(default_factory=ScaleSettings)
    spatial: SpatialSettings = STILL
    intensity: WindowIntensity = field(default_factory=WindowIntensity)
    optim: OptimSettings = OPTIM

    @classmethod
    def for_plan(cls, plan: PretrainPlan) -> Vox2VecSettings:
        """The released code's numbers, with at most as many pairs per case as take no more voxels than one global crop, which the
        plans' batch size was chosen for; short runs with fewer voxels for the Tiny presets."""
        pairs = pairs_per_case(plan)
        if plan.preset.endswith("Tiny"):
            return cls(epochs=20, iterations=50, pairs=pairs, contrast=ContrastSettings(voxels=256), optim=tiny_optim())
        return cls(pairs=pairs)


def pairs_per_case(plan: PretrainPlan) -> int:
    """Ten, or as many pairs of local crops as take no more voxels than a global crop."""
    return max(1, min(10, math.prod(plan.global_crop) // (2 * math.prod(plan.local_crop))))


def tiny_optim() -> OptimSettings:
    """For the short runs of the Tiny presets."""
    return OptimSettings(lr=1e-3, weight_decay=0.0, betas=(0.9, 0.999), schedule="cosine", clip=1.0)


class Vox2VecTrainer(DenseContrast):
    """The method; see the module's head.

    Args:
        settings: what to do.
        backbone: what to train.
        plan: crop size, and what its intensities mean.
    """

    settings_type = Vox2VecSettings
    citations = (VOX2VEC,)

    def __init__(self, settings: Vox2VecSettings, backbone: Backbone, plan: PretrainPlan) -> None:
        super().__init__(backbone, settings.contrast)
        self.settings = settings
        self.view_policy = AnchoredPairs(
            settings.crop or plan.local_crop,
            settings.intensity,
            settings.scale,
            plan.hounsfield[0],
            settings.pairs,
            settings.spatial,
        )

    def forward(self, views: tuple[View, ...]) -> Step:
        """The contrast of all pairs."""
        found = self.contrast(views)
        return Step(found.loss, found.terms, found.watch)

    @torch.no_grad()
    def pictures(self, views: tuple[View, ...]) -> dict[str, Shaped[Tensor, "B _C Z Y X"]]:
        """The first pair, and its finest level as colours that mean the same in both."""
        first, second = (view.voxels for view in views[:2])
        maps = self.levels(torch.cat((first, second)))[1].levels[0].chunk(2)
        colours = pca_rgb(maps, [view.size for view in views[:2]])
        return {"first": first, "features of first": colours[0], "second": second, "features of second": colours[1]}
