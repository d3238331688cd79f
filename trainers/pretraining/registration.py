"""Features for registration, trained through the registration itself, without labels.

Every case is drawn twice, the second time moved, deformed and re-contrasted by known amounts; and every two cases of a batch are
registered with each other by the features as they are, together with MIND (the pseudo fields of CoRe, arXiv:2603.23694; MIND keeps
the first ones sensible). Both kinds of pairs teach the same: a coupled convex search with a soft choice should find the field,
and places that correspond should be more alike than others (voxel InfoNCE). No head stands between the map that is trained and
the map that `nnssl_register -c CHECKPOINT@decoder0` reads; the squared differences are those that the solver minimises.

Weak supervision, where asked for: labels join what cases are registered by, their overlap after the search is a loss too, and
the network's segmentation layer should tell them from the trained map. `nnssl_register -c CHECKPOINT@labels` then registers by
what it tells, which is much better for these labels than the map itself, and says nothing about what has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from nnssl_ext.contracts import Backbone, OptimRule, PretrainPlan
from nnssl_ext.engine.settings import OptimSettings
from nnssl_ext.errors import NnsslError
from nnssl_ext.networks.plain_method import PlainMethod
from nnssl_ext.networks.segmentation_layer import segmentation_layer, tell_labels
from nnssl_ext.networks.watched import watched_places
from nnssl_ext.objectives.segmentation import segmentation_loss
from nnssl_ext.records import Features, Size, Step, View
from nnssl_ext.registration.extraction import LABELS
from nnssl_ext.registration.learning import (
    LayerSettings,
    MapPair,
    Triple,
    comparable,
    contrast,
    find_correspondence,
    layer_losses,
)
from nnssl_ext.registration.pairing import Crops, Guides, pair_crops
from nnssl_ext.registration.pooling import cells_to_voxels, geometric_mean
from nnssl_ext.registration.solver import SolverSettings
from nnssl_ext.registration.warp import warp
from nnssl_ext.reports.feature_pca import pca_rgb
from nnssl_ext.views.policies import IntensitySettings, SpatialSettings
from nnssl_ext.views.recipes import REGISTRATION_INTENSITY, REGISTRATION_SPATIAL
from nnssl_ext.views.registration_pairs import RegistrationPairs, drawn_warp
from nnssl_ext.views.warps import WarpSettings

Losses = dict[str, Float[Tensor, ""]]


@dataclass(frozen=True)
class RegistrationSettings:
    """Settings of `RegistrationTrainer`.

    Attributes:
        epochs, iterations: 32 x 250 = 8,000 optimiser steps (CoRe).
        crop: voxels z, y, x; None = the plans' local crop, the global one for Tiny presets. Different cases are compared where
            their crops overlap once the middles of the cases lie on each other: the larger a share of a case a crop shows, the more.
        level: what is trained: the finest map of the ``decoder`` and all below it, or the coarsest of the ``encoder``, which for
            token backbones is the token map.
        layer: the search that features are trained through.
        guide: share of MIND, beside the features themselves, in finding out what corresponds in two cases.
        refinement: iterations of Adam in doing so (CoRe: 50); 0 leaves it to the coarse search.
        places: per pair, for the InfoNCE; 1,000 in CoRe.
        temperature: of the InfoNCE, on squared differences (channel mean) of which unrelated places have about 0.21; logits then
            span 10, as those of cosines at CoRe's 0.1.
        contrast: weight of the InfoNCE; that of the displacement error, in cells of the layer, is 1.
        cross: weight of pairs of different cases against 1 for pairs of one case; 0 spares registering them.
        labels: weak supervision with these labels of the dataset's segmentations; none: no label is read.
        overlap: weight of the labels' overlap.
        segmentation: weight of telling labels, where the decoder is trained; the search alone teaches them at its cells'
            resolution. At 3 it makes 0.3 to 0.4 of the gradient (hippocampus).
        spatial, shift, warp, intensity: how the two sides of a pair of one case differ, see `RegistrationPairs`.
        optim: AdamW.
    """

    epochs: int = 32
    iterations: int = 250
    crop: tuple[int, int, int] | None = None
    level: Literal["decoder", "encoder"] = "decoder"
    layer: LayerSettings = field(default_factory=LayerSettings)
    guide: float = 0.5
    refinement: int = 25
    places: int = 1000
    temperature: float = 0.02
    contrast: float = 0.3
    cross: float = 1.0
    labels: tuple[int, ...] = ()
    overlap: float = 1.0
    segmentation: float = 3.0
    spatial: SpatialSettings = REGISTRATION_SPATIAL
    shift: float = 0.05
    warp: WarpSettings = field(default_factory=WarpSettings)
    intensity: IntensitySettings = REGISTRATION_INTENSITY
    optim: OptimSettings = field(default_factory=OptimSettings)

    def __post_init__(self) -> None:
        if not 0 <= self.guide <= 1:
            raise NnsslError(f"guide {self.guide} is not in [0, 1]", "0: the features alone, 1: MIND alone")
        if min(self.labels, default=1) < 1:
            raise NnsslError(f"labels {self.labels} name the background", "name labels of structures, from 1 on")

    @classmethod
    def for_plan(cls, plan: PretrainPlan) -> RegistrationSettings:
        """Short runs on whole cases for the Tiny presets. Optimiser, weights and iterations are our choice; what is CoRe's is
        said where it stands."""
        if plan.preset.endswith("Tiny"):
            optim = OptimSettings(lr=1e-3, schedule="cosine", betas=(0.9, 0.95))
            return cls(epochs=10, iterations=50, crop=plan.global_crop, places=512, optim=optim)
        return cls()


class RegistrationTrainer(PlainMethod):
    """The method; see the module's head.

    Different cases meet in twos, the first with the second of a batch and so on, so a batch of one teaches from single cases
    only.

    Args:
        settings: what to do.
        backbone: what to train.
        plan: crop size and spacing.
    """

    settings_type = RegistrationSettings
    citations = (
        "Siebert et al. ConvexAdam: Self-Configuring Dual-Optimization-Based 3D Multitask Medical Image Registration. TMI 2024",
        "CoRe. arXiv:2603.23694",
    )

    def __init__(self, settings: RegistrationSettings, backbone: Backbone, plan: PretrainPlan) -> None:
        in_decoder = settings.level == "decoder"
        super().__init__(backbone, backbone.encoder_prefixes + (backbone.decoder_prefixes if in_decoder else ()))
        self.settings = settings
        self.voxel_mm = plan.spacing
        self.view_policy = RegistrationPairs(
            settings.crop or plan.local_crop,
            settings.spatial,
            settings.shift,
            settings.warp,
            settings.intensity,
            labels=bool(settings.labels),
        )
        self.feature_level = "decoder0" if in_decoder else f"encoder{len(backbone.channels) - 1}"
        self.tells_labels = bool(settings.labels and settings.segmentation and in_decoder)
        if self.tells_labels:
            tell_labels(backbone.network, 1 + len(settings.labels))
            prefix, _ = segmentation_layer(backbone.network)
            self.pretrained_prefixes += (prefix,)
            self.feature_level = LABELS
            # At the backbone's rate its loss fell to 1.04 in 200 steps, at ten times the rate to 0.48 in 50 (hippocampus).
            self.optim_rules = (OptimRule(f"backbone.network.{prefix}", lr_scale=10.0),)

    def forward(self, views: tuple[View, ...]) -> Step:
        """Losses of all pairs of the batch."""
        fixed, moving = views
        deformation, deformed = _deform(fixed)
        features = self.backbone.forward_features(torch.cat((deformed, moving.voxels)))
        maps, stride = self._level(features)
        with torch.autocast(maps.device.type, enabled=False):
            first, second = maps.float().chunk(2)
            crops = pair_crops(fixed, moving, deformation, (first, second), stride, self.settings.labels)
            same = [self._losses(pair) for pair in crops.same()]
            found = crops.different(self._find) if self.settings.cross else []
            different = [self._losses(pair) for pair in found]
            told = self._segmentation(crops)
        return self._step(same, different, told, features)

    @torch.no_grad()
    def pictures(self, views: tuple[View, ...]) -> dict[str, Shaped[Tensor, "B _C Z Y X"]]:
        """The first case's deformed view and the view that it should be found in, their features as colours, and the moving view
        brought back by what registering the features says."""
        fixed, moving = views
        _, image = _deform(fixed)
        maps, stride = self._level(self.backbone.forward_features(torch.cat((image, moving.voxels))))
        first, second = maps.float().chunk(2)
        colours = pca_rgb([first, second], [fixed.size, moving.size])
        everywhere = torch.ones(first.shape[2:], dtype=torch.bool, device=first.device)
        there, _ = find_correspondence(
            [(first[0], second[0])], [1.0], (everywhere, everywhere), self._cell_mm(stride), self._solver
        )
        back = warp(moving.voxels[:1], cells_to_voxels(there, stride, fixed.size)[None])
        return {
            "fixed": image,
            "features of fixed": colours[0],
            "moving": moving.voxels,
            "features of moving": colours[1],
            "moving, registered": back,
        }

    @property
    def _solver(self) -> SolverSettings:
        """How maps are registered: cells of the layer's size first, then of two voxels."""
        edge = geometric_mean(self.voxel_mm)
        return SolverSettings(
            coarse_mm=self.settings.layer.cell * edge, fine_mm=2 * edge, iterations=self.settings.refinement
        )

    def _find(
        self, guides: Guides, seen: tuple[Bool[Tensor, "z y x"], Bool[Tensor, "z y x"]], spacing: Triple
    ) -> tuple[Float[Tensor, "3 z y x"], Float[Tensor, "3 z y x"]]:
        """Two cases registered by features, MIND, and labels if there are any: as much by labels as by both others."""
        weights = [1 - self.settings.guide, self.settings.guide, 1.0][: len(guides)]
        return find_correspondence(guides, weights, seen, spacing, self._solver)

    def _level(self, features: Features) -> tuple[Float[Tensor, "N C z y x"], Size]:
        """The trained map and its stride."""
        if self.settings.level == "encoder":
            return features.levels[-1], features.strides[-1]
        decoded = self.backbone.forward_decoder(features)
        return decoded.levels[0], decoded.strides[0]

    def _cell_mm(self, stride: Size) -> Triple:
        z, y, x = (factor * mm for factor, mm in zip(stride, self.voxel_mm, strict=True))
        return z, y, x

    def _segmentation(self, crops: Crops) -> Losses:
        """`segmentation_loss` of all views, where labels teach."""
        if not self.tells_labels or crops.labels is None:
            return {}
        _, layer = segmentation_layer(self.backbone.network)
        sides = (crops.fixed, crops.labels[0], crops.inside), (crops.moving, crops.labels[1], crops.seen)
        losses = [
            segmentation_loss(layer(maps[None])[0], shares, weight.float())
            for side in sides
            for maps, shares, weight in zip(*side, strict=True)
        ]
        return {"segmentation": torch.stack(losses).mean()}

    def _losses(self, pair: MapPair) -> Losses:
        pair = comparable(pair)
        losses = layer_losses(pair, geometric_mean(self.voxel_mm), self.settings.layer)
        return {**losses, "contrast": contrast(pair, self.settings.places, self.settings.temperature)}

    def _step(self, same: Sequence[Losses], different: Sequence[Losses], told: Losses, features: Features) -> Step:
        settings = self.settings
        edge = settings.layer.cell * geometric_mean(self.voxel_mm)  # mm
        weights = {"error": 1 / edge, "contrast": settings.contrast, "overlap": settings.overlap}
        zero = features.summary.new_zeros(())
        means: dict[str, Tensor] = {}
        parts: dict[str, Tensor] = {}
        for name in same[0]:
            known, found = (_mean([losses[name] for losses in kind], zero) for kind in (same, different))
            means |= {name: known.detach()} | ({f"cross_{name}": found.detach()} if different else {})
            parts[name] = weights[name] * (known + settings.cross * found)
        means |= {name: loss.detach() for name, loss in told.items()}
        parts |= {name: settings.segmentation * loss for name, loss in told.items()}
        loss = torch.stack(list(parts.values())).sum()
        watch = {"features": features.summary.detach(), "tokens": watched_places(features.levels[-1])}
        return Step(loss, means, watch, parts)


def _deform(view: View) -> tuple[Float[Tensor, "B 3 Z Y X"], Float[Tensor, "B C Z Y X"]]:
    """The deformation that was drawn for a view, in voxels, and the view as it deforms it.

    Without autocast: bfloat16 places voxels up to one apart, and the field is known only if the image follows it.
    """
    with torch.autocast(view.voxels.device.type, enabled=False):
        deformation = drawn_warp(view)
        return deformation, warp(view.voxels, deformation)


def _mean(values: Sequence[Float[Tensor, ""]], otherwise: Float[Tensor, ""]) -> Float[Tensor, ""]:
    return torch.stack(list(values)).mean() if values else otherwise
