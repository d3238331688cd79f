"""Vectors of single voxels: what the levels of a network say about a place, one behind the other (vox2vec, arXiv:2307.14725).

A level of stride s holds voxel ``v`` in its cell ``v // s``, axis by axis.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nnssl_ext.contracts import Backbone
from nnssl_ext.networks.global_batch_norm import GlobalBatchNorm
from nnssl_ext.records import Features, Size

Vectors = tuple[Float[Tensor, "B K _C"], ...]
"""One tensor per level, finest first."""


def pyramid(backbone: Backbone, features: Features, decoder: bool) -> Features:
    """The levels that vectors are made of: the decoder's maps and the encoder's coarsest, or all of the encoder's."""
    if not decoder:
        return features
    decoded = backbone.forward_decoder(features)
    return Features(
        levels=(*decoded.levels, features.levels[-1]),
        strides=(*decoded.strides, features.strides[-1]),
        summary=features.summary,
    )


def pyramid_channels(backbone: Backbone, decoder: bool) -> tuple[int, ...]:
    """Channels of `pyramid`'s levels."""
    return (*backbone.decoder_channels, backbone.channels[-1]) if decoder else backbone.channels


def look_up(level: Float[Tensor, "B C z y x"], stride: Size, voxels: Int[Tensor, "B K 3"]) -> Float[Tensor, "B K C"]:
    """The vector of the cell in which each voxel lies."""
    _, y, x = level.shape[2:]
    iz, iy, ix = (voxels[..., axis] // step for axis, step in enumerate(stride))
    number = (iz * y + iy) * x + ix
    return level.flatten(2).gather(2, number[:, None].expand(-1, level.shape[1], -1)).mT


def look_up_all(
    levels: Sequence[Float[Tensor, "B _C _z _y _x"]], strides: Sequence[Size], voxels: Int[Tensor, "B K 3"]
) -> Vectors:
    """`look_up` in every level."""
    return tuple(look_up(level, stride, voxels) for level, stride in zip(levels, strides, strict=True))


def level_shares(vectors: Vectors, valid: Bool[Tensor, "B K"]) -> Float[Tensor, " L"]:
    """Which share of the squared length of the concatenated vector each level has, mean over valid voxels; no gradient."""
    squares = torch.stack([level.detach().float().square().sum(-1) for level in vectors])
    shares = squares / squares.sum(0).clamp(min=1e-12) * valid
    return shares.sum((1, 2)) / valid.sum().clamp(min=1)


class Balance(nn.Module):
    """A projection of each level to the same width, so that coarse levels, which have most channels, do not decide alone
    (arXiv:2401.06473). Applied to vectors, it is the paper's 1x1x1 convolution of the maps, at the places that are asked for.

    Args:
        channels: of the levels.
        width: of each level after it; the paper's 32.
        trained: off keeps the random projections as they are: the paper's released code holds them in a list that the
            optimiser and the checkpoint do not know.
    """

    def __init__(self, channels: Sequence[int], width: int, trained: bool) -> None:
        super().__init__()
        self.levels = nn.ModuleList(nn.Linear(channel, width) for channel in channels)
        self.requires_grad_(trained)

    def forward(self, vectors: Vectors) -> Vectors:
        return tuple(project(level) for project, level in zip(self.levels, vectors, strict=True))


class Projector(nn.Module):
    """vox2vec's head: two hidden layers as wide as the vector, with batch norm and ReLU, and a linear one; then length 1.

    Args:
        channels: of the vector.
        out_dim: of the embedding; 128 in both papers.
    """

    def __init__(self, channels: int, out_dim: int) -> None:
        super().__init__()
        self.hidden = nn.ModuleList(nn.Linear(channels, channels, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(GlobalBatchNorm(channels) for _ in range(2))
        self.out = nn.Linear(channels, out_dim)

    def forward(self, vectors: Float[Tensor, "B K C"], valid: Bool[Tensor, "B K"]) -> Float[Tensor, "B K D"]:
        """Embeddings in float32; the batch's statistics are those of the valid vectors."""
        rows = vectors.flatten(0, 1)
        for layer, norm in zip(self.hidden, self.norms, strict=True):
            rows = torch.relu(norm(layer(rows), valid.flatten()))
        return nn.functional.normalize(self.out(rows).float(), dim=1).unflatten(0, vectors.shape[:2])
