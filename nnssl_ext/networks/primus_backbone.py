"""`SegmentationPrimus` behind the `TokenBackbone` contract."""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nnssl_ext.errors import NnsslError
from nnssl_ext.networks.eva import select_rows
from nnssl_ext.networks.primus import SegmentationPrimus, as_map
from nnssl_ext.records import Features, Size


class PrimusBackbone(nn.Module):
    """A token backbone; see `nnssl_ext.contracts.TokenBackbone`.

    Its only parameter beside the network's is ``mask_token``, which is not exported.
    """

    def __init__(self, network: SegmentationPrimus) -> None:
        super().__init__()
        self.network = network
        self.embed_dim = network.embed_dim
        self.num_heads = network.embed_dim // network.head_dim
        self.channels: tuple[int, ...] = (network.embed_dim,)
        self.token_size: Size = network.token_size
        self.strides: tuple[Size, ...] = (network.token_size,)
        self.decoder_channels: tuple[int, ...] = tuple(cast(list[int], network.decoder.widths)[::-1])
        self.divisor: Size = network.token_size
        self.encoder_prefixes: tuple[str, ...] = ("down_projection.", "eva.", "class_token", "register_tokens")
        self.decoder_prefixes: tuple[str, ...] = ("decoder.stages.",)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, network.embed_dim))  # zero at the start, as DINOv2's

    def forward_features(self, x: Float[Tensor, "B C Z Y X"], mask: Bool[Tensor, "B z y x"] | None = None) -> Features:
        """The token map after the last norm. The summary is the class token, or without one the mean token."""
        grid = self.network.token_grid(x.shape[2:])
        tokens = self.network.embed(x)
        if mask is not None:
            hidden = self._flat(mask, grid).to(x.device, non_blocking=True)[..., None]
            tokens = torch.where(hidden, self.mask_token.to(tokens.dtype), tokens)
        prefix, tokens = self.network.encode(tokens + self.network.positions(grid), grid)
        summary = prefix[:, 0] if self.network.class_token is not None else tokens.mean(dim=1)
        return Features(levels=(as_map(tokens, grid),), strides=self.strides, summary=summary)

    def forward_decoder(self, features: Features) -> Features:
        """The patch decoder's maps, finest first."""
        maps = self.network.decoder.maps(features.levels[0])[::-1]
        cumulative = np.cumprod(self.network.strides, axis=0)[:-1].tolist()
        return Features(levels=tuple(maps), strides=tuple(map(tuple, cumulative)), summary=features.summary)

    def forward_visible(
        self, x: Float[Tensor, "B C Z Y X"], mask: Bool[Tensor, "B z y x"]
    ) -> tuple[Float[Tensor, "B V E"], Int[Tensor, "B V"]]:
        """Encode the tokens that `mask` leaves visible, in C order.

        A mask on the CPU spares waiting for the device, because the number of visible tokens must be known here.

        Raises:
            NnsslError: samples with different numbers of visible tokens.
        """
        grid = self.network.token_grid(x.shape[2:])
        ids = visible_ids(self._flat(mask, grid)).to(x.device, non_blocking=True)
        tokens = select_rows(self.network.embed(x) + self.network.positions(grid), ids)
        return self.network.encode(tokens, grid, ids)[1], ids

    def _flat(self, mask: Bool[Tensor, "B z y x"], grid: Size) -> Bool[Tensor, "B L"]:
        if tuple(mask.shape[1:]) != grid:
            raise NnsslError(
                f"mask of {tuple(mask.shape[1:])} cells for a grid of {grid} tokens", "draw masks on the token grid"
            )
        return mask.flatten(1)


def visible_ids(mask: Bool[Tensor, "B L"]) -> Int[Tensor, "B V"]:
    """Ascending indices of the visible (False) tokens of each sample.

    Raises:
        NnsslError: the samples differ in their number, or one has none.
    """
    counts = cast(list[int], (~mask).sum(dim=1).tolist())
    if min(counts) != max(counts) or min(counts) == 0:
        raise NnsslError(
            f"samples of one batch show {counts} tokens",
            "draw masks that hide the same number of tokens in every sample, and not all",
        )
    return mask.to(torch.uint8).argsort(dim=1, stable=True)[:, : counts[0]]
