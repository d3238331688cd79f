"""Disruptive autoencoders: what was done to the low-level detail of a crop is undone.

Valanarasu et al., "Disruptive Autoencoders: Leveraging Low-level features for 3D Medical Image Pre-training", MIDL 2024,
arXiv:2307.16896. Noise is added to the crop, its resolution is lowered, and after the patch embedding some channels are hidden
at all places, in this order; encoder and decoder of the segmentation network restore the clean crop, L1 over all its voxels.
Nothing in the network sees the clean crop, the decoder's skips included. For a U-Net, channels are hidden after the stem.

Differences from the released code (Project-MONAI/research-contributions, DAE): every sample hides channels of its own, where
there the batch shares one set. The optional contrast between modalities is supervised contrastive on normalised pooled features;
there, cross-entropy takes modalities for places in the batch. Modalities come from dataset.json, there from file names.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from nnssl_ext.contracts import Backbone, PretrainPlan
from nnssl_ext.engine.settings import OptimSettings
from nnssl_ext.errors import NnsslError
from nnssl_ext.networks.plain_method import PlainMethod
from nnssl_ext.networks.stem_mask import StemMask
from nnssl_ext.objectives.processes import gather_over_processes
from nnssl_ext.objectives.supervised_contrast import supervised_contrast
from nnssl_ext.records import Features, Step, View
from nnssl_ext.views.disruptions import SeededView, add_noise, draw_hidden, lower_resolution
from nnssl_ext.views.policies import SpatialSettings
from nnssl_ext.views.recipes import STILL

CT_WINDOW = 2000.0
"""HU that the paper scales to [0, 1]: from -1000 to 1000."""


@dataclass(frozen=True)
class DisruptiveAESettings:
    """Settings of `DisruptiveAETrainer`; numbers are those of the paper's code for all disruptions together.

    Attributes:
        epochs, iterations: 1000 x 250 optimiser steps; an epoch is the interval of logging (the paper's are over its data, and
            it takes 300 where only one disruption is on).
        noise_variance: of Gaussian noise, in the paper's units: CT scaled from [-1000, 1000] HU to [0, 1], so 0.1 is a standard
            deviation of 632 HU, which the plans' normalisation turns into ours; everything else as it is normalised, in the
            paper the z-scored MR, so 0.1 is 0.32 standard deviations. 0: off.
        downsample: every so many voxels along z, y, x are kept, nearest neighbour. 1 1 1: off.
        hidden_channels: share of the stem's channels set to 0, in training only. 0: off.
        contrast: weight of the contrast between modalities, which are the entries of ``case_modalities`` in dataset.json; needs
            several cases of a modality in a step. 0 is off; 0.03 in the paper's first version (arXiv v1).
        temperature: of the contrast.
        spatial: random crops, not turned.
        optim: AdamW, warm-up over 4 of 1000 epochs (here from 0, there from 1e-6).
    """

    epochs: int = 1000
    iterations: int = 250
    noise_variance: float = 0.1
    downsample: tuple[int, int, int] = (4, 4, 4)
    hidden_channels: float = 0.6
    contrast: float = 0.0
    temperature: float = 0.5
    spatial: SpatialSettings = STILL
    optim: OptimSettings = field(
        default_factory=lambda: OptimSettings(
            lr=1e-4, final_lr=1e-5, schedule="cosine", warmup=0.004, weight_decay=0.05, betas=(0.9, 0.999), clip=1.0
        )
    )

    def __post_init__(self) -> None:
        if not 0 <= self.hidden_channels < 1:
            raise NnsslError(
                f"hidden_channels {self.hidden_channels} is not in [0, 1)", "0 is off; the paper hides 0.6"
            )
        if self.noise_variance < 0:
            raise NnsslError(f"noise_variance {self.noise_variance} is negative", "0 is off; the paper has 0.1")
        if min(self.downsample) < 1:
            raise NnsslError(f"downsample {self.downsample}", "1 1 1 is off; the paper keeps every 4th voxel: 4 4 4")
        if self.contrast < 0 or self.temperature <= 0:
            raise NnsslError(
                f"contrast {self.contrast} at temperature {self.temperature}",
                "give a weight of 0 (off) or more, and a temperature above 0, 0.5 in the paper",
            )

    @classmethod
    def for_plan(cls, plan: PretrainPlan) -> DisruptiveAESettings:
        """The paper's numbers; short runs for the Tiny presets, with the rates that suit their masked autoencoder."""
        if plan.preset.endswith("Tiny"):
            return cls(epochs=40, iterations=50, optim=OptimSettings(lr=2e-3, weight_decay=1e-2, betas=(0.9, 0.95)))
        return cls()


class DisruptiveAETrainer(PlainMethod):
    """The method; see the module's head. It trains encoder and decoder.

    Args:
        settings: what to do.
        backbone: what to train, all but its segmentation heads.
        plan: crop size, channels, and the unit of CT.
    """

    settings_type = DisruptiveAESettings
    citations = (
        "Valanarasu et al. Disruptive Autoencoders: Leveraging Low-level Features for 3D Medical Image Pre-training. MIDL 2024. "
        + "arXiv:2307.16896",
    )

    def __init__(self, settings: DisruptiveAESettings, backbone: Backbone, plan: PretrainPlan) -> None:
        super().__init__(backbone, (*backbone.encoder_prefixes, *backbone.decoder_prefixes))
        self.settings = settings
        self.view_policy = SeededView(plan.global_crop, settings.spatial)
        units = [1.0 if scale is None else CT_WINDOW / scale.std for scale in plan.hounsfield]
        self.noise_std = torch.tensor(units) * math.sqrt(settings.noise_variance)
        self.stem = StemMask(backbone.network)
        self.head = nn.Conv3d(backbone.decoder_channels[0], plan.channels, kernel_size=1)

    def forward(self, views: tuple[View, ...]) -> Step:
        """The error on all voxels of the crop, padding around the case included; and the contrast, if it has weight."""
        (view,) = views
        disrupted = self._disrupt(view)
        prediction, features = self._restore(disrupted, self._hidden(view) if self.training else None)
        loss = F.l1_loss(prediction.float(), view.voxels)
        terms = {
            "zero_predictor": view.voxels.abs().mean(),
            "disrupted": F.l1_loss(disrupted, view.voxels),  # what copying the input would make
        }
        parts: dict[str, Tensor] = {}
        if self.settings.contrast:
            contrast = self._contrast(features, view)
            terms |= {"restoration": loss.detach(), "contrast": contrast.detach()}
            parts = {"restoration": loss, "contrast": self.settings.contrast * contrast}
            loss = parts["restoration"] + parts["contrast"]
        return Step(loss, terms, {"features": features.summary.detach()}, parts)

    @torch.no_grad()
    def pictures(self, views: tuple[View, ...]) -> dict[str, Float[Tensor, "B C Z Y X"]]:
        """The clean crop, the disrupted one, what becomes of it with channels hidden as in training, and the error."""
        (view,) = views
        disrupted = self._disrupt(view)
        restored = self._restore(disrupted, self._hidden(view))[0].float()
        return {
            "clean": view.voxels,
            "disrupted": disrupted,
            "restored": restored,
            "error": (restored - view.voxels).abs(),
        }

    def _disrupt(self, view: View) -> Float[Tensor, "B C Z Y X"]:
        voxels = view.voxels
        if self.settings.noise_variance:
            voxels = add_noise(voxels, self.noise_std, _facts(view, "noise_seed"))
        return lower_resolution(voxels, self.settings.downsample)

    def _hidden(self, view: View) -> Bool[Tensor, "B C"]:
        drawn = draw_hidden(self.stem.width, self.settings.hidden_channels, _facts(view, "channels_seed"))
        return drawn.to(view.voxels.device, non_blocking=True)

    def _restore(
        self, voxels: Float[Tensor, "B C Z Y X"], hidden: Bool[Tensor, "B W"] | None
    ) -> tuple[Float[Tensor, "B C Z Y X"], Features]:
        """The predicted crop and the encoder's features, with these channels of the stem hidden."""
        self.stem.hidden = hidden
        try:
            features = self.backbone.forward_features(voxels)
        finally:
            self.stem.hidden = None
        return self.head(self.backbone.forward_decoder(features).levels[0]), features

    def _contrast(self, features: Features, view: View) -> Float[Tensor, ""]:
        """Over the samples of all processes."""
        modality = torch.tensor(_facts(view, "modality")).to(view.voxels.device, non_blocking=True)
        vectors, labels = gather_over_processes(features.summary.float()), gather_over_processes(modality)
        return supervised_contrast(vectors, labels, self.settings.temperature)


def _facts(view: View, name: str) -> list[int]:
    return [int(facts[name]) for facts in view.applied]
