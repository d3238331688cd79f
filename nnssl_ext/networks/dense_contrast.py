"""What contrastive methods on voxels share: vectors of matched voxels of two views, their projections and the loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from nnssl_ext.contracts import Backbone, TokenBackbone
from nnssl_ext.errors import NnsslError
from nnssl_ext.geometry.voxel_pairs import VoxelPairs, sample_pairs
from nnssl_ext.networks.plain_method import PlainMethod
from nnssl_ext.networks.pyramid import Balance, Projector, Vectors, level_shares, look_up_all, pyramid, pyramid_channels
from nnssl_ext.networks.watched import watched_places
from nnssl_ext.objectives.nt_xent import nt_xent
from nnssl_ext.records import Features, Size, View
from nnssl_ext.views.anchored_pairs import body_mask, joined

WATCHED = 64
"""Embeddings of each pair of crops that monitors see."""


@dataclass(frozen=True)
class ContrastSettings:
    """How voxels are compared; the numbers are vox2vec's (arXiv:2307.14725, released code).

    Attributes:
        voxels: most matched body voxels per pair of crops.
        temperature: of the softmax over cosines.
        out_dim: of the embeddings.
        decoder: vectors come from the decoder's maps and the coarsest of the encoder; off: from the encoder's maps alone, which
            then are all that is trained. Of tokens without finer levels at most one voxel each is taken.
        levels: how many of them, finest first; None = all, as it must be without the decoder.
    """

    voxels: int = 1024
    temperature: float = 0.1
    out_dim: int = 128
    decoder: bool = True
    levels: int | None = None

    def __post_init__(self) -> None:
        if self.voxels < 1 or self.temperature <= 0 or (self.levels is not None and self.levels < 1):
            raise NnsslError(
                f"contrast settings out of range: {self}", "voxels and levels from 1 on, temperature above 0"
            )


@dataclass(frozen=True)
class Contrast:
    """The outcome of `DenseContrast.contrast`.

    Attributes:
        loss: NT-Xent.
        first, second: the views, all pairs of all cases as one batch.
        levels: the levels of both, first before second.
        terms, watch: for `nnssl_ext.records.Step`.
    """

    loss: Float[Tensor, ""]
    first: View
    second: View
    levels: Features
    terms: dict[str, Tensor]
    watch: dict[str, Tensor]


class DenseContrast(PlainMethod):
    """Backbone, projections and projector, for the views of `nnssl_ext.views.anchored_pairs.AnchoredPairs`.

    Args:
        backbone: what to train: encoder and decoder, or the encoder only.
        settings: how voxels are compared.
        width: channels of each level after `Balance`; None leaves levels as they are.
        train_balance: whether those projections are trained.

    Raises:
        NnsslError: no decoder, and levels of the encoder that would get no gradient.
    """

    def __init__(
        self, backbone: Backbone, settings: ContrastSettings, width: int | None = None, train_balance: bool = True
    ) -> None:
        super().__init__(backbone, backbone.encoder_prefixes + (backbone.decoder_prefixes if settings.decoder else ()))
        self.contrast_settings = settings
        every = pyramid_channels(backbone, settings.decoder)
        channels = every[: settings.levels]
        if not settings.decoder and len(channels) < len(every):
            raise NnsslError(
                f"--contrast.levels {settings.levels}: without the decoder, levels beyond it of the encoder's {len(every)} would "
                "not be trained",
                "set --contrast.levels None, or leave the decoder on",
            )
        self.balance = None if width is None else Balance(channels, width, train_balance)
        self.projector = Projector(sum(channels) if width is None else width * len(channels), settings.out_dim)
        tokens = isinstance(backbone, TokenBackbone) and settings.decoder  # whose decoder ends at single voxels
        self.cell: Size = (1, 1, 1) if tokens else backbone.strides[0]

    def levels(self, voxels: Float[Tensor, "B C Z Y X"]) -> tuple[Features, Features]:
        """The encoder's features, and the levels that vectors are made of."""
        features = self.backbone.forward_features(voxels)
        every = pyramid(self.backbone, features, self.contrast_settings.decoder)
        wanted = self.contrast_settings.levels
        return features, Features(every.levels[:wanted], every.strides[:wanted], every.summary)

    def match(self, views: tuple[View, ...]) -> tuple[View, View, VoxelPairs]:
        """The first and the second views as one batch each, and the body voxels that are compared."""
        first, second = joined(views[0::2]), joined(views[1::2])
        seeds = [int(facts["voxel_seed"]) for facts in first.applied]
        voxels = self.contrast_settings.voxels
        return first, second, sample_pairs(first, second, body_mask(first), voxels, self.cell, seeds)

    def contrast(self, views: tuple[View, ...]) -> Contrast:
        """The loss of all pairs; views alternate between first and second of a pair."""
        cases = len(views[0].cases)
        first, second, pairs = self.match(views)
        features, levels = self.levels(torch.cat((first.voxels, second.voxels)))
        sides = self._vectors(levels, pairs)
        embedded = [self.projector(torch.cat(side, dim=-1), pairs.valid) for side in sides]
        valid = rearrange(pairs.valid, "(p b) k -> b (p k)", b=cases)
        e1, e2 = (rearrange(side, "(p b) k d -> b (p k) d", b=cases) for side in embedded)
        loss = nt_xent(e1, e2, valid, self.contrast_settings.temperature)
        shares = level_shares(sides[0], pairs.valid)
        terms = {f"share_level{number}": share for number, share in enumerate(shares)}
        terms["voxels"] = pairs.valid.float().sum(dim=1).mean()
        watch = {
            "features": features.summary.detach(),
            "projector": embedded[0][:, :WATCHED].detach().flatten(0, 1),
            "tokens": watched_places(features.levels[-1]),
        }
        return Contrast(loss, first, second, levels, terms, watch)

    def _vectors(self, levels: Features, pairs: VoxelPairs) -> tuple[Vectors, Vectors]:
        """Vectors of the sampled voxels of the first and of the second views."""
        halves = zip(*(level.chunk(2) for level in levels.levels), strict=True)
        found = [
            look_up_all(half, levels.strides, voxels)
            for half, voxels in zip(halves, (pairs.first, pairs.second_voxel), strict=True)
        ]
        first, second = found if self.balance is None else map(self.balance, found)
        return first, second
