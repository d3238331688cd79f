"""Swin UNETR (Hatamizadeh et al., arXiv:2201.01266) as a segmentation network that nnU-Net builds from plans.

All layers are MONAI's (optional extra ``swin``). Arranged here for nnU-Net: encoder ``swinViT`` under MONAI's own parameter
names, so its weights and those of published Swin UNETRs fit; a decoder with one segmentation layer per resolution, which is
what nnU-Net's deep supervision and its loader of pretrained weights ask for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dynamic_network_architectures.architectures.abstract_arch import AbstractDynamicNetworkArchitectures
from jaxtyping import Float
from torch import Tensor, nn

from nnssl_ext.errors import NnsslError

STRIDES = ((1, 1, 1), *((2, 2, 2),) * 5)
"""Of MONAI's Swin UNETR from resolution to resolution: patches of 2 voxels, then four mergings."""


class SwinDecoder(nn.Module):
    """Convolutional decoder of MONAI's Swin UNETR, from coarse to fine, and a 1x1x1 head on each of its maps.

    As in nnU-Net's ``UNetDecoder``, `seg_layers` exist whether or not they are used, and `deep_supervision` may be switched
    at any time.
    """

    def __init__(self, parts: Any, widths: Sequence[int], num_classes: int, deep_supervision: bool) -> None:
        super().__init__()
        # finest first: the input image, then the encoder's maps; MONAI hands the stride-16 map over as it is
        self.skips = nn.ModuleList((parts.encoder1, parts.encoder2, parts.encoder3, parts.encoder4, nn.Identity()))
        self.bottleneck = parts.encoder10
        self.stages = nn.ModuleList((parts.decoder5, parts.decoder4, parts.decoder3, parts.decoder2, parts.decoder1))
        self.seg_layers = nn.ModuleList(nn.Conv3d(width, num_classes, kernel_size=1) for width in widths)
        self.deep_supervision = deep_supervision

    def maps(self, levels: Sequence[Float[Tensor, "B _C _Z _Y _X"]]) -> list[Float[Tensor, "B _W _Z _Y _X"]]:
        """The stages' maps, coarse to fine, from the image and the encoder's five maps, finest first."""
        current, found = self.bottleneck(levels[-1]), []
        for stage, skip, level in zip(self.stages, reversed(self.skips), levels[-2::-1], strict=True):
            current = stage(current, skip(level))
            found.append(current)
        return found

    def forward(self, levels: Sequence[Float[Tensor, "B _C _Z _Y _X"]]) -> Tensor | list[Tensor]:
        """Logits at full resolution, or with deep supervision at all resolutions, finest first."""
        maps = self.maps(levels)
        if not self.deep_supervision:
            return self.seg_layers[-1](maps[-1])
        return [layer(m) for layer, m in zip(self.seg_layers, maps, strict=True)][::-1]


class SegmentationSwinUNETR(AbstractDynamicNetworkArchitectures):
    """Swin UNETR in 3D. Every edge of its input must be a multiple of 32 voxels.

    Args:
        input_channels, num_classes: as nnU-Net passes them.
        feature_size: channels of the first encoder map, a multiple of 12; doubled from map to map.
        depths, num_heads: of the four Swin stages.
        window_size: edge of the attention windows, in tokens.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.
        strides: always `STRIDES`; in the plans because nnU-Net derives deep supervision from them.
        deep_supervision: whether `forward` gives all resolutions.

    Raises:
        NnsslError: MONAI is not installed, or other strides.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        feature_size: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        window_size: int,
        drop_path_rate: float = 0.0,
        strides: Sequence[Sequence[int]] = STRIDES,
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        if tuple(map(tuple, strides)) != STRIDES:
            raise NnsslError(
                f"strides {strides} of SegmentationSwinUNETR", f"they are fixed: {list(map(list, STRIDES))}"
            )
        # what nnU-Net's loaders of pretrained weights ask for
        self.key_to_encoder, self.key_to_stem, self.key_to_lpe = "swinViT", "swinViT.patch_embed", None
        self.keys_to_in_proj = (
            "swinViT.patch_embed.proj",
            "decoder.skips.0.layer.conv1.conv",
            "decoder.skips.0.layer.conv3.conv",
        )
        parts = _monai()(
            in_channels=input_channels,
            out_channels=num_classes,
            feature_size=feature_size,
            depths=tuple(depths),
            num_heads=tuple(num_heads),
            window_size=window_size,
            dropout_path_rate=drop_path_rate,
        )
        self.widths = [feature_size * factor for factor in (8, 4, 2, 1, 1)]
        self.swinViT = parts.swinViT
        self.decoder = SwinDecoder(parts, self.widths, num_classes, deep_supervision)

    def encode(self, x: Float[Tensor, "B C Z Y X"]) -> list[Float[Tensor, "B _C _Z _Y _X"]]:
        """The image itself, then the encoder's maps at strides 2 to 32, each normalised over its channels.

        Raises:
            NnsslError: an edge that is no multiple of 32 voxels.
        """
        if any(edge % 32 for edge in x.shape[2:]):
            raise NnsslError(
                f"input of {'x'.join(map(str, x.shape[2:]))} voxels to a Swin UNETR",
                "make every edge of the patch or crop a multiple of 32",
            )
        return [x, *self.swinViT(x)]

    def forward(self, x: Float[Tensor, "B C Z Y X"]) -> Tensor | list[Tensor]:
        """Logits ``(B, classes, Z, Y, X)``, or with deep supervision a list of them, finest first."""
        return self.decoder(self.encode(x))


def _monai() -> Any:
    """MONAI's class.

    Raises:
        NnsslError: it is not installed.
    """
    try:
        from monai.networks.nets.swin_unetr import SwinUNETR
    except ImportError as error:
        raise NnsslError(f"Swin UNETR needs MONAI: {error}", 'pip install "nnssl-ext[swin]"') from error
    return SwinUNETR
