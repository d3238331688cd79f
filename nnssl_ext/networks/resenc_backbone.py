"""nnU-Net's encoder-decoder U-Nets behind the `Backbone` contract."""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nnssl_ext.errors import NnsslError
from nnssl_ext.objectives.reconstruction import upsample_mask
from nnssl_ext.records import Features, Size


class ResEncBackbone(nn.Module):
    """A convolutional backbone; see `nnssl_ext.contracts.Backbone`. nnU-Net's plain U-Net has the same parts and fits too."""

    def __init__(self, network: ResidualEncoderUNet | PlainConvUNet) -> None:
        super().__init__()
        self.network = network
        encoder = network.encoder
        per_stage = [(s,) * 3 if isinstance(s, int) else tuple(s) for s in encoder.strides]
        if len(per_stage[0]) != 3:
            raise NnsslError("the network of these plans is 2D", "pretrain a 3D configuration, e.g. 3d_fullres")
        self.channels: tuple[int, ...] = tuple(encoder.output_channels)
        self.strides = cast(tuple[Size, ...], tuple(map(tuple, np.cumprod(per_stage, axis=0).tolist())))
        self.decoder_channels: tuple[int, ...] = tuple(layer.in_channels for layer in network.decoder.seg_layers)[::-1]
        self.divisor: Size = self.strides[-1]
        self.token_size: Size | None = None
        # the decoder holds the encoder a second time: the same tensors under other names
        self.encoder_prefixes: tuple[str, ...] = ("encoder.", "decoder.encoder.")
        self.decoder_prefixes: tuple[str, ...] = ("decoder.stages.", "decoder.transpconvs.")

    def forward_features(self, x: Float[Tensor, "B C Z Y X"], mask: Bool[Tensor, "B z y x"] | None = None) -> Features:
        """All encoder stages. Masked voxels are set to 0 first; the mask's grid may be any that divides the input.
        The summary is the mean over the coarsest stage.

        Raises:
            NnsslError: an input that the strides do not divide, or a mask that does not divide the input.
        """
        depth, height, width = x.shape[2:]
        size = (depth, height, width)
        if any(s % d for s, d in zip(size, self.divisor, strict=True)):
            raise NnsslError(
                f"input of {'x'.join(map(str, size))} voxels is not divisible by the network's stride {self.divisor}",
                f"make every edge of the patch or crop a multiple of {self.divisor}",
            )
        if mask is not None:
            if any(s % g for s, g in zip(size, mask.shape[1:], strict=True)):
                raise NnsslError(
                    f"a mask of {tuple(mask.shape[1:])} cells does not divide {size} voxels",
                    "draw masks on a grid that does",
                )
            x = x.masked_fill(upsample_mask(mask.to(x.device, non_blocking=True), size), 0)
        skips = self.network.encoder(x)
        return Features(levels=tuple(skips), strides=self.strides, summary=skips[-1].mean(dim=(2, 3, 4)))

    def forward_decoder(self, features: Features) -> Features:
        """The decoder's maps, finest first, as ``UNetDecoder`` computes them but without the segmentation heads."""
        decoder = self.network.decoder
        current, maps = features.levels[-1], []
        for transpconv, stage, skip in zip(decoder.transpconvs, decoder.stages, features.levels[-2::-1], strict=True):
            current = stage(torch.cat((transpconv(current), skip), dim=1))
            maps.append(current)
        return Features(levels=tuple(maps[::-1]), strides=self.strides[:-1], summary=features.summary)
