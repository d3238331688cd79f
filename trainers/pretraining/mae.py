"""Masked autoencoders in 3D.

Tokens (Primus): He et al., "Masked Autoencoders Are Scalable Vision Learners", arXiv:2111.06377. Three quarters of the
tokens are hidden; the encoder sees the visible ones only; a light transformer fills the grid with a mask token and
predicts the hidden voxels; mean squared error on hidden voxels. ``variant="simmim"`` follows Xie et al.,
arXiv:2111.09886: mask tokens go through the encoder, L1 on hidden voxels. Its head is not linear but the segmentation
network's own patch decoder, which is as light and is thereby pretrained too.

Convolutions (ResEnc): Wald et al., "Revisiting MAE pre-training for 3D medical image segmentation", arXiv:2410.23132,
the plain form: hidden blocks of the input are set to 0, encoder and decoder of the segmentation network reconstruct
them through a 1x1x1 head, mean squared error on hidden voxels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nnssl_ext.contracts import Backbone, PretrainPlan, TokenBackbone
from nnssl_ext.engine.settings import OptimSettings
from nnssl_ext.errors import NnsslError
from nnssl_ext.geometry.matching import inside_case
from nnssl_ext.networks.plain_method import PlainMethod
from nnssl_ext.networks.token_decoder import TokenDecoder
from nnssl_ext.objectives.reconstruction import masked_error, patchify, token_statistics, unpatchify, upsample_mask
from nnssl_ext.records import Size, Step, View
from nnssl_ext.views.masks import MaskSettings, common_cell, mask_grid
from nnssl_ext.views.policies import IntensitySettings, SingleView, SpatialSettings


@dataclass(frozen=True)
class MAESettings:
    """Settings of `MAETrainer`.

    Attributes:
        epochs, iterations: 1000 x 250 optimiser steps (nnssl's length); an epoch is the interval of logging.
        variant: ``mae``, or ``simmim`` (token backbones only); see the module's head.
        mask_ratio: hidden share; 0.75 in MAE, its 3D forms and nnssl.
        mask_block: voxels z, y, x hidden together; None = single tokens (MAE), or for convolutions `default_block`.
        normalise_targets: per-token target normalisation (MAE, Table 1d); off as in nnssl.
        flat_std: floor of the standard deviation in that normalisation, in units of the normalised image; our choice.
        decoder_depth: blocks of the light decoder; its width is about half the encoder's. MAE, Table 1a and b: depth
            hardly matters for fine-tuning.
        spatial: crops and nnU-Net's flips, rotations and zooms.
        augment_intensity, intensity: off, because crops suffice (MAE, Table 1e).
        optim: nnssl's values for SimMIM on Primus, for both variants (MIM-Med3D's MAE has the same rate and decay; nnssl's own on
            Primus 3e-5 and 5e-3), and for MAE on ResEnc.
    """

    epochs: int = 1000
    iterations: int = 250
    variant: Literal["mae", "simmim"] = "mae"
    mask_ratio: float = 0.75
    mask_block: tuple[int, int, int] | None = None
    normalise_targets: bool = False
    flat_std: float = 0.1
    decoder_depth: int = 2
    spatial: SpatialSettings = field(default_factory=SpatialSettings)
    augment_intensity: bool = False
    intensity: IntensitySettings = field(default_factory=IntensitySettings)
    optim: OptimSettings = field(default_factory=OptimSettings)

    def __post_init__(self) -> None:
        if not 0 < self.mask_ratio < 1:
            raise NnsslError(f"mask_ratio {self.mask_ratio} is not between 0 and 1", "MAE uses --mask_ratio 0.75")

    @classmethod
    def for_plan(cls, plan: PretrainPlan) -> MAESettings:
        """The defaults for a backbone: nnssl's optimisers (2 x 250,000 steps), shorter runs for the Tiny presets."""
        if plan.preset.endswith("Tiny"):
            # hippocampus, 2,000 steps: 0.32 to 0.39 of a zero predictor's 0.94; betas as in MAE
            return cls(epochs=40, iterations=50, optim=OptimSettings(lr=2e-3, weight_decay=1e-2, betas=(0.9, 0.95)))
        if plan.preset.startswith(("Primus", "Swin")):  # transformers
            return cls()
        sgd = OptimSettings(
            optimizer="nesterov", lr=1e-2, weight_decay=3e-5, betas=(0.99, 0.0), schedule="poly", warmup=0.0, clip=12.0
        )
        return cls(optim=sgd)


class MAETrainer(PlainMethod):
    """The method: one view, masked; see the module's head.

    Args:
        settings: what to do.
        backbone: what to train; all of a token backbone's encoder, all of a convolutional one but its heads.
        plan: crop size and channels.

    Raises:
        NnsslError: SimMIM on convolutions; while drawing, a mask block that is no multiple of the token.
    """

    settings_type = MAESettings
    citations = (
        "He et al. Masked Autoencoders Are Scalable Vision Learners. CVPR 2022. arXiv:2111.06377",
        "Wald et al. Revisiting MAE pre-training for 3D medical image segmentation. CVPR 2025. arXiv:2410.23132",
    )

    def __init__(self, settings: MAESettings, backbone: Backbone, plan: PretrainPlan) -> None:
        both = (*backbone.encoder_prefixes, *backbone.decoder_prefixes)
        super().__init__(backbone, both, mask_token=settings.variant == "simmim")
        self.settings = settings
        size = plan.global_crop
        block = settings.mask_block or (None if backbone.token_size else default_block(size))
        cell = backbone.token_size or common_cell(size, block or size)
        self.cell: Size = cell
        self.view_policy = SingleView(
            size,
            MaskSettings(cell, settings.mask_ratio, block),
            settings.spatial,
            settings.intensity if settings.augment_intensity else None,
        )
        self.reconstruct: nn.Module = MaskedInput(backbone, plan.channels)
        if settings.variant == "mae" and isinstance(backbone, TokenBackbone):
            self.pretrained_prefixes = backbone.encoder_prefixes
            self.reconstruct = VisibleTokens(backbone, plan.channels, settings.decoder_depth)
        elif settings.variant == "simmim" and not isinstance(backbone, TokenBackbone):
            raise NnsslError("SimMIM needs tokens, which a convolutional backbone has not", "use --variant mae")

    def forward(self, views: tuple[View, ...]) -> Step:
        """The error on hidden voxels that lie inside the case."""
        (view,) = views
        prediction, features = self.reconstruct(view.voxels, view.mask)
        target, _, _ = self._target(view)
        weight = self._weight(view)
        power = 1 if self.settings.variant == "simmim" else 2
        loss = masked_error(prediction, target, weight, power)
        zero = masked_error(torch.zeros_like(target), target, weight, power)
        return Step(loss, terms={"zero_predictor": zero.detach()}, watch={"features": features.detach()})

    @torch.no_grad()
    def pictures(self, views: tuple[View, ...]) -> dict[str, Float[Tensor, "B C Z Y X"]]:
        """The crop, what was seen of it, the reconstruction of the hidden rest, and the error."""
        (view,) = views
        prediction, _ = self.reconstruct(view.voxels, view.mask)
        _, mean, std = self._target(view)
        hidden = upsample_mask(_mask(view), view.size)
        filled = torch.where(hidden, prediction.float() * std + mean, view.voxels)
        return {
            "crop": view.voxels,
            "seen": view.voxels.masked_fill(hidden, 0),
            "reconstruction": filled,
            "error": (filled - view.voxels).abs(),
        }

    def _weight(self, view: View) -> Float[Tensor, "B C Z Y X"]:
        counts = upsample_mask(_mask(view), view.size) & inside_case(view)
        return counts.expand_as(view.voxels).to(view.voxels.dtype)

    def _target(self, view: View) -> tuple[Tensor, Tensor, Tensor]:
        """The target with the mean and standard deviation that were taken out of it (0 and 1 without normalisation)."""
        voxels = view.voxels
        if not self.settings.normalise_targets:
            return voxels, torch.zeros_like(voxels[:1, :1]), torch.ones_like(voxels[:1, :1])
        size = view.size
        grid = mask_grid(size, self.cell)
        tokens = patchify(voxels, self.cell)
        valid = patchify(inside_case(view).expand_as(voxels).to(voxels.dtype), self.cell)
        mean, std = (
            unpatchify(value.expand_as(tokens), self.cell, grid)
            for value in token_statistics(tokens, valid, self.settings.flat_std)
        )
        return (voxels - mean) / std, mean, std


class VisibleTokens(nn.Module):
    """MAE: encode visible tokens, decode all."""

    def __init__(self, backbone: TokenBackbone, channels: int, depth: int) -> None:
        super().__init__()
        self.backbone = backbone
        head_dim = backbone.embed_dim // backbone.num_heads
        heads = max(1, round(backbone.num_heads / 2))
        out_dim = channels * _voxels(backbone.token_size)
        self.decoder = TokenDecoder(backbone.embed_dim, heads * head_dim, depth, heads, out_dim)

    def forward(
        self, voxels: Float[Tensor, "B C Z Y X"], mask: Bool[Tensor, "B z y x"]
    ) -> tuple[Float[Tensor, "B C Z Y X"], Float[Tensor, "B E"]]:
        """The predicted volume and the mean visible token."""
        z, y, x = mask.shape[1:]
        visible, ids = self.backbone.forward_visible(voxels, mask)
        prediction = self.decoder(visible, ids, (z, y, x))
        return unpatchify(prediction, self.backbone.token_size, (z, y, x)), visible.mean(dim=1)


class MaskedInput(nn.Module):
    """SimMIM and convolutions: hidden tokens replaced by the mask token, or hidden blocks set to 0; encoder, decoder and a
    1x1x1 head reconstruct."""

    def __init__(self, backbone: Backbone, channels: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Conv3d(backbone.decoder_channels[0], channels, kernel_size=1)

    def forward(
        self, voxels: Float[Tensor, "B C Z Y X"], mask: Bool[Tensor, "B z y x"]
    ) -> tuple[Float[Tensor, "B C Z Y X"], Float[Tensor, "B E"]]:
        """The predicted volume and the summary of the crop."""
        features = self.backbone.forward_features(voxels, mask)
        return self.head(self.backbone.forward_decoder(features).levels[0]), features.summary


def default_block(crop: Size) -> Size:
    """Block of a convolutional MAE: nnssl's 16 voxels, halved per axis until at least 4 blocks lie along the axis, for
    small and anisotropic crops."""

    def along(length: int) -> int:
        return next((b for b in (16, 8, 4, 2) if length >= 4 * b), 1)

    z, y, x = crop
    return along(z), along(y), along(x)


def _mask(view: View) -> Bool[Tensor, "B z y x"]:
    assert view.mask is not None, "the policy of MAE draws masks"
    return view.mask.to(view.voxels.device, non_blocking=True)


def _voxels(token: Size) -> int:
    return token[0] * token[1] * token[2]
