"""SimSiam on pairs of crops whose overlap is controlled.

Chen & He, "Exploring Simple Siamese Representation Learning", arXiv:2011.10566: two views go through one encoder, a projector
and, on one side, a predictor; each prediction is pulled towards the other view's projection, through which no gradient flows.
No negatives, no teacher. What the views share decides how well it works: an AGH thesis (2023, code: dittohed/exploring-ssl-for-ct)
found crops of CT with an intersection over union in [0.3, 0.6] best, and collapse for random or disjoint ones.

``dense`` adds the same loss between places of the coarsest feature maps that show the same point of the case (weighted as in
DenseCL, arXiv:2011.09157, Eq. 4; the places follow from the views' affines), through heads of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from nnssl_ext.contracts import Backbone, OptimRule, PretrainPlan
from nnssl_ext.engine.settings import OptimSettings
from nnssl_ext.errors import NnsslError
from nnssl_ext.geometry.matching import matched_cells
from nnssl_ext.networks.plain_method import PlainMethod
from nnssl_ext.networks.simsiam_heads import predictor, projector
from nnssl_ext.networks.watched import watched_places
from nnssl_ext.objectives.simsiam import dense_simsiam_loss, simsiam_loss
from nnssl_ext.records import Features, Step, View
from nnssl_ext.reports.feature_pca import pca_rgb
from nnssl_ext.views.iou_pairs import IoUPairs
from nnssl_ext.views.policies import IntensitySettings, SpatialSettings
from nnssl_ext.views.recipes import SIMSIAM_INTENSITY, SIMSIAM_SPATIAL

PAIRS_PER_STEP = 256
"""Pairs per optimiser step that the learning rate of 0.05 is for (SimSiam, Sec. 3)."""

SGD = OptimSettings(
    optimizer="sgd",
    lr=0.05,
    lr_scaling="linear",
    lr_batch=None,
    weight_decay=1e-5,
    betas=(0.9, 0.0),
    schedule="cosine",
    warmup=0.0,
    clip=1000.0,
)
"""LR 0.025 at the thesis' 128 pairs, cosine without warm-up; gradients of cosines need no clipping."""


@dataclass(frozen=True)
class SimSiamSettings:
    """Settings of `SimSiamTrainer`; numbers without a source are the thesis'.

    Attributes:
        epochs, iterations: 740 x 250 = 185,000 optimiser steps; an epoch is the interval of logging.
        crop: voxels z, y, x; None = the plans' local crop, half of the global one, because pairs need room in the case.
        iou: smallest and largest intersection over union of a pair; [0, 1] = random crops.
        iou_mode: ``exact``, or the published ``rejection`` with its fallbacks (see `IoUPairs`).
        pairs: per case. Batch norm needs many crops: the thesis' batch was 128.
        projector_dim, predictor_dim: 2048, and the predictor's bottleneck of 512 (SimSiam, Sec. 3).
        predictor: off removes the predictor, which collapses (SimSiam, Table 1); for comparison only.
        dense: weight of the dense loss, 1 - dense that of the pooled one; 0.5 in DenseCL.
        spatial, intensity: augmentations of each crop.
        optim: SGD; predictor at the constant peak rate. ``lr_batch`` None: the cases that make `PAIRS_PER_STEP`.
    """

    epochs: int = 740
    iterations: int = 250
    crop: tuple[int, int, int] | None = None
    iou: tuple[float, float] = (0.3, 0.6)
    iou_mode: Literal["exact", "rejection"] = "exact"
    pairs: int = 4
    projector_dim: int = 2048
    predictor_dim: int = 512
    predictor: bool = True
    dense: float = 0.0
    spatial: SpatialSettings = SIMSIAM_SPATIAL
    intensity: IntensitySettings = SIMSIAM_INTENSITY
    optim: OptimSettings = SGD

    def __post_init__(self) -> None:
        if not 0 <= self.dense < 1:
            raise NnsslError(f"dense {self.dense} is not in [0, 1)", "0 is off; DenseCL weighs both losses alike: 0.5")
        if self.pairs < 1:
            raise NnsslError(f"pairs {self.pairs}", "draw at least one pair per case")

    @classmethod
    def for_plan(cls, plan: PretrainPlan) -> SimSiamSettings:
        """The thesis' numbers, with as many pairs per case as take no more voxels than one global crop, which the plans'
        batch size was chosen for; short runs, small heads and AdamW for the Tiny presets."""
        room = math.prod(plan.global_crop) // (2 * math.prod(plan.local_crop))
        pairs = max(1, room)
        if plan.preset.endswith("Tiny"):
            return cls(
                epochs=20,
                iterations=50,
                pairs=min(2, pairs),
                projector_dim=512,
                predictor_dim=128,
                optim=OptimSettings(lr=1e-3, weight_decay=1e-5, schedule="cosine", betas=(0.9, 0.95), clip=1.0),
            )
        return cls(pairs=pairs)

    def settled(self) -> SimSiamSettings:
        """With ``lr_batch`` in whole cases, where it is open."""
        if self.optim.lr_batch is not None:
            return self
        return replace(self, optim=replace(self.optim, lr_batch=max(1, PAIRS_PER_STEP // self.pairs)))


class SimSiamTrainer(PlainMethod):
    """The method; see the module's head. It trains the encoder.

    Batch norm takes its statistics over the crops of one micro-batch and all processes, for each side of the pairs; so
    gradient accumulation does not stand in for a larger batch here.

    Args:
        settings: what to do.
        backbone: what to train.
        plan: crop size.
    """

    settings_type = SimSiamSettings
    citations = (
        "Chen & He. Exploring Simple Siamese Representation Learning. CVPR 2021. arXiv:2011.10566",
        "Thesis on IoU-cropped SimSiam for CT. AGH Krakow, 2023. https://github.com/dittohed/exploring-ssl-for-ct",
    )

    def __init__(self, settings: SimSiamSettings, backbone: Backbone, plan: PretrainPlan) -> None:
        super().__init__(backbone, backbone.encoder_prefixes)
        self.settings = settings
        self.view_policy = IoUPairs(
            settings.crop or plan.local_crop,
            iou=settings.iou,
            mode=settings.iou_mode,
            pairs=settings.pairs,
            spatial=settings.spatial,
            intensity=settings.intensity,
        )
        self.heads = Heads(backbone.channels[-1], settings)
        self.dense_heads = Heads(backbone.channels[-1], settings) if settings.dense else None
        names = ("heads.", "dense_heads.") if settings.dense else ("heads.",)
        if settings.predictor:
            self.optim_rules = tuple(OptimRule(f"{name}predictor.", constant=True) for name in names)

    def forward(self, views: tuple[View, ...]) -> Step:
        """The symmetric loss of all pairs; views alternate between first and second of a pair."""
        firsts, seconds = views[0::2], views[1::2]
        features = self.backbone.forward_features(torch.cat([view.voxels for view in (*firsts, *seconds)]))
        (z1, p1), (z2, p2) = (self.heads(vectors) for vectors in features.summary.chunk(2))
        loss = simsiam_loss(p1, z1, p2, z2)
        terms, parts = {}, {}
        if self.dense_heads is not None:
            dense = self._dense_loss(self.dense_heads, features, firsts, seconds)
            weight = self.settings.dense
            parts = {"simsiam": (1 - weight) * loss, "dense": weight * dense}
            terms = {"simsiam": loss.detach(), "dense": dense.detach()}
            loss = parts["simsiam"] + parts["dense"]
        for name in ("iou", "iou_fallback"):
            drawn = [sample[name] for view in firsts for sample in view.applied]
            terms[name] = torch.full((), sum(drawn) / len(drawn), device=loss.device)
        return Step(loss, terms, self._watch(features, torch.cat((z1, z2)), torch.cat((p1, p2))), parts)

    @torch.no_grad()
    def pictures(self, views: tuple[View, ...]) -> dict[str, Shaped[Tensor, "B _C Z Y X"]]:
        """The first pair, and its coarsest features as colours that mean the same in both."""
        pair = views[:2]
        maps = [self.backbone.forward_features(view.voxels).levels[-1] for view in pair]
        colours = pca_rgb(maps, [view.size for view in pair])
        first, second = (view.voxels for view in pair)
        return {"first": first, "features of first": colours[0], "second": second, "features of second": colours[1]}

    def _dense_loss(
        self, heads: Heads, features: Features, firsts: tuple[View, ...], seconds: tuple[View, ...]
    ) -> Float[Tensor, ""]:
        sides = [heads.on_map(side) for side in features.levels[-1].chunk(2)]
        (z1, p1), (z2, p2) = sides
        stride = features.strides[-1]
        forth = [matched_cells(a, b, stride) for a, b in zip(firsts, seconds, strict=True)]
        back = [matched_cells(b, a, stride) for a, b in zip(firsts, seconds, strict=True)]
        at2, valid1 = map(torch.cat, zip(*forth, strict=True))
        at1, valid2 = map(torch.cat, zip(*back, strict=True))
        return dense_simsiam_loss(p1, z1, p2, z2, at2, valid1, at1, valid2)

    def _watch(self, features: Features, z: Float[Tensor, "N D"], p: Float[Tensor, "N D"]) -> dict[str, Tensor]:
        return {
            "features": features.summary.detach(),
            "projector": z.detach(),
            "predictor": p.detach(),
            "tokens": watched_places(features.levels[-1]),
        }


class Heads(nn.Module):
    """Projector and predictor of one loss; without a predictor, predictions are the projections."""

    def __init__(self, channels: int, settings: SimSiamSettings) -> None:
        super().__init__()
        dim = settings.projector_dim
        self.projector = projector(channels, dim)
        self.predictor = predictor(dim, settings.predictor_dim) if settings.predictor else nn.Identity()

    def forward(self, vectors: Float[Tensor, "N C"]) -> tuple[Float[Tensor, "N D"], Float[Tensor, "N D"]]:
        """Projections and predictions.

        Raises:
            NnsslError: a single vector, of which batch norm would make a constant.
        """
        if self.training and len(vectors) < 2:
            raise NnsslError("SimSiam's batch norm needs at least 2 pairs per process", "raise --pairs or --batch_size")
        projections = self.projector(vectors)
        return projections, self.predictor(projections)

    def on_map(
        self, features: Float[Tensor, "B C z y x"]
    ) -> tuple[Float[Tensor, "B D z y x"], Float[Tensor, "B D z y x"]]:
        """The same at every place of a map."""
        places = features.movedim(1, -1)
        z, p = (
            rows.unflatten(0, places.shape[:-1]).movedim(-1, 1) for rows in self(places.reshape(-1, places.shape[-1]))
        )
        return z, p
