"""`SegmentationSwinUNETR` behind the `Backbone` contract."""

from __future__ import annotations

from typing import cast

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nnssl_ext.errors import NnsslError
from nnssl_ext.networks.swin_unetr import STRIDES, SegmentationSwinUNETR
from nnssl_ext.objectives.reconstruction import upsample_mask
from nnssl_ext.records import Features, Size


class SwinBackbone(nn.Module):
    """See `nnssl_ext.contracts.Backbone`. Its finest level is the image itself, which the decoder reads as a skip."""

    def __init__(self, network: SegmentationSwinUNETR, input_channels: int) -> None:
        super().__init__()
        self.network = network
        width = network.widths[-1]
        self.channels: tuple[int, ...] = (input_channels, *(width * 2**stage for stage in range(5)))
        self.strides = cast(tuple[Size, ...], tuple(map(tuple, np.cumprod(STRIDES, axis=0).tolist())))
        self.decoder_channels: tuple[int, ...] = tuple(network.widths[::-1])
        self.divisor: Size = self.strides[-1]
        self.token_size: Size | None = None  # windows of tokens, but no sequence that could be shortened
        self.encoder_prefixes: tuple[str, ...] = ("swinViT.",)
        self.decoder_prefixes: tuple[str, ...] = ("decoder.skips.", "decoder.bottleneck.", "decoder.stages.")

    def forward_features(self, x: Float[Tensor, "B C Z Y X"], mask: Bool[Tensor, "B z y x"] | None = None) -> Features:
        """The image and all encoder maps. Masked voxels are set to 0 first; the mask's grid must divide the input.
        The summary is the mean over the coarsest map.

        Raises:
            NnsslError: an input whose edges are no multiples of 32 voxels.
        """
        if mask is not None:
            z, y, x_ = x.shape[2:]
            x = x.masked_fill(upsample_mask(mask.to(x.device, non_blocking=True), (z, y, x_)), 0)
        levels = self.network.encode(x)
        return Features(levels=tuple(levels), strides=self.strides, summary=levels[-1].mean(dim=(2, 3, 4)))

    def forward_decoder(self, features: Features) -> Features:
        """The decoder's maps, finest first.

        Raises:
            NnsslError: a coarsest map of one place, which the decoder's instance norm cannot normalise.
        """
        if features.levels[-1][0, 0].numel() == 1:
            raise NnsslError(
                f"a crop of {'x'.join(map(str, self.divisor))} voxels leaves the decoder of a Swin UNETR a single place",
                "give a crop with an edge of at least 64 voxels, e.g. --crop 64 64 64",
            )
        maps = self.network.decoder.maps(features.levels)[::-1]
        return Features(levels=tuple(maps), strides=self.strides[:-1], summary=features.summary)
