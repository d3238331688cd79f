"""Primus (arXiv 2503.01835) as a segmentation network that nnU-Net builds from plans and that pretraining can fill.

Encoder, parameter names and initialisation are those of dynamic-network-architectures' ``Primus``, so its weights and nnssl's
fit. The decoder differs: its widths do not depend on the number of classes, which leaves only ``decoder.seg_layers`` to
differ between data sets, and it has the outputs that nnU-Net's deep supervision asks for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from dynamic_network_architectures.architectures.abstract_arch import AbstractDynamicNetworkArchitectures
from dynamic_network_architectures.initialization.weight_init import InitWeights_He
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from nnssl_ext.errors import NnsslError
from nnssl_ext.networks._timm import PatchEmbed
from nnssl_ext.networks.eva import make_blocks, rotary_positions, run_blocks
from nnssl_ext.records import Size

FULL_RESOLUTION_WIDTH = 16
"""Channels of the decoder's last stage: our choice; DNA's Primus has twice the number of classes one stage earlier."""


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of ``(B, C, Z, Y, X)``: DNA's ``LayerNormNd`` in half its time and memory."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Float[Tensor, "B C Z Y X"]) -> Float[Tensor, "B C Z Y X"]:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class PatchDecoder(nn.Module):
    """Token map -> one map per resolution, each doubling (or keeping) every axis, and a 1x1x1 head on each.

    As in nnU-Net's ``UNetDecoder``, stages run from coarse to fine, `seg_layers` exist whether or not they are used, and
    `deep_supervision` may be switched at any time.
    """

    def __init__(
        self,
        embed_dim: int,
        strides: Sequence[Sequence[int]],
        widths: Sequence[int],
        num_classes: int,
        deep_supervision: bool,
    ) -> None:
        super().__init__()
        self.widths = [int(width) for width in widths]
        sides = zip([embed_dim, *widths][:-1], widths, [as_size(s) for s in strides[:0:-1]], strict=True)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.ConvTranspose3d(wide, narrow, stride, stride), ChannelNorm(narrow), nn.GELU())
            for wide, narrow, stride in sides
        )
        self.seg_layers = nn.ModuleList(nn.Conv3d(width, num_classes, kernel_size=1) for width in widths)
        self.deep_supervision = deep_supervision

    def maps(self, tokens: Float[Tensor, "B E z y x"]) -> list[Float[Tensor, "B _W _Z _Y _X"]]:
        """The stages' maps, coarse to fine."""
        found = []
        for stage in self.stages:
            tokens = stage(tokens)
            found.append(tokens)
        return found

    def forward(self, tokens: Float[Tensor, "B E z y x"]) -> Tensor | list[Tensor]:
        """Logits at full resolution, or with deep supervision at all resolutions, finest first."""
        maps = self.maps(tokens)
        if not self.deep_supervision:
            return self.seg_layers[-1](maps[-1])
        return [layer(m) for layer, m in zip(self.seg_layers, maps, strict=True)][::-1]


class SegmentationPrimus(AbstractDynamicNetworkArchitectures):
    """Primus with a class-independent patch decoder.

    Args:
        input_channels, num_classes: as nnU-Net passes them.
        embed_dim, eva_depth, eva_numheads: see `nnssl_ext.networks.presets`.
        input_shape: voxels z, y, x that the learned positions are laid out for; other sizes interpolate them.
        strides: per axis, from resolution to resolution as in a U-Net, the first all ones; their product is the token in voxels.
        num_register_tokens, class_token: extra tokens without position; they are parameters beside ``eva``.
        drop_path_rate, init_values, scale_attn_inner: defaults of nnU-Net's Primus trainers.
        decoder_widths: channels of each decoder stage, coarse to fine; default: geometric from embed_dim to 16.
        deep_supervision: whether `forward` gives all resolutions.

    Raises:
        NnsslError: sizes that do not fit together.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        embed_dim: int,
        eva_depth: int,
        eva_numheads: int,
        input_shape: Sequence[int],
        strides: Sequence[Sequence[int]],
        num_register_tokens: int = 0,
        class_token: bool = False,
        drop_path_rate: float = 0.2,
        init_values: float | None = 0.1,
        scale_attn_inner: bool = True,
        decoder_widths: Sequence[int] | None = None,
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        # what nnU-Net's loaders of pretrained weights ask for
        self.key_to_encoder, self.key_to_stem, self.key_to_lpe = "eva", "down_projection", "eva.pos_embed"
        self.keys_to_in_proj = ("down_projection.proj",)

        if len(strides) < 2 or any(s != 1 for s in strides[0]):
            raise NnsslError(
                f"strides {strides} of SegmentationPrimus: the first must be ones and at least one more must follow",
                "for tokens of 4 voxels write [[1, 1, 1], [2, 2, 2], [2, 2, 2]]",
            )
        widths = decoder_widths or default_decoder_widths(embed_dim, len(strides) - 1)
        if len(widths) != len(strides) - 1:
            raise NnsslError(
                f"decoder_widths {widths} for {len(strides) - 1} decoder stages", "give one width per stage"
            )
        self.embed_dim = embed_dim
        self.head_dim = embed_dim // eva_numheads
        self.strides = tuple(as_size(stride) for stride in strides)
        self.token_size = as_size(math.prod(axis) for axis in zip(*self.strides, strict=True))
        self.reference_grid = self.token_grid(input_shape)
        self.num_prefix_tokens = int(class_token) + num_register_tokens

        self.down_projection = PatchEmbed(self.token_size, input_channels, embed_dim)
        self.eva = make_blocks(
            embed_dim,
            eva_depth,
            eva_numheads,
            grid=self.reference_grid,
            prefix_tokens=self.num_prefix_tokens,
            drop_path_rate=drop_path_rate,
            init_values=init_values,
            scale_attn_inner=scale_attn_inner,
        )
        self.class_token = nn.Parameter(torch.empty(1, 1, embed_dim)) if class_token else None
        self.register_tokens = (
            nn.Parameter(torch.empty(1, num_register_tokens, embed_dim)) if num_register_tokens else None
        )
        for extra in self._prefix():
            nn.init.normal_(extra, std=1e-6)  # DINOv2 and DNA's Primus
        self.decoder = PatchDecoder(embed_dim, self.strides, widths, num_classes, deep_supervision)
        self.apply(self.initialize)

    @staticmethod
    def initialize(module: nn.Module) -> None:
        """nnU-Net calls this on every module; as in DNA's Primus, only convolutions are touched."""
        InitWeights_He(1e-2)(module)

    def token_grid(self, size: Sequence[int]) -> Size:
        """Tokens along z, y, x of an input of `size` voxels.

        Raises:
            NnsslError: the token does not divide the input.
        """
        if len(size) != 3 or any(s % t or s < t for s, t in zip(size, self.token_size, strict=True)):
            raise NnsslError(
                f"input of {'x'.join(map(str, size))} voxels cannot be cut into tokens of {self.token_size} voxels",
                "make every edge of the patch or crop a multiple of the token",
            )
        return as_size([s // t for s, t in zip(size, self.token_size, strict=True)])

    def embed(self, x: Float[Tensor, "B C Z Y X"]) -> Float[Tensor, "B L E"]:
        """Tokens in C order of the grid, without positions. The token must divide the input, see `token_grid`."""
        return rearrange(self.down_projection(x), "b e z y x -> b (z y x) e")

    def positions(self, grid: Size) -> Float[Tensor, "1 L E"]:
        """Learned positions of a grid; grids other than the reference interpolate them trilinearly in fp32."""
        table = self.eva.pos_embed
        if grid == self.reference_grid:
            return table
        z, y, x = self.reference_grid
        volume = rearrange(table.float(), "b (z y x) e -> b e z y x", z=z, y=y, x=x)
        return rearrange(F.interpolate(volume, size=grid, mode="trilinear"), "b e z y x -> b (z y x) e")

    def encode(
        self, tokens: Float[Tensor, "B N E"], grid: Size, ids: Int[Tensor, "B N"] | None = None
    ) -> tuple[Float[Tensor, "B P E"], Float[Tensor, "B N E"]]:
        """The transformer on tokens that carry their learned positions.

        Args:
            tokens: all tokens of `grid` in C order, or those of `ids`.
            ids: flat grid index of each token, per sample.

        Returns:
            The encoded prefix (class token first, then registers) and the encoded tokens.
        """
        prefix = [extra.expand(len(tokens), -1, -1).to(tokens.dtype) for extra in self._prefix()]
        rotary = rotary_positions(grid, self.head_dim, tokens.device)
        encoded = run_blocks(self.eva, torch.cat([*prefix, tokens], dim=1), rotary, ids)
        return encoded[:, : self.num_prefix_tokens], encoded[:, self.num_prefix_tokens :]

    def forward(self, x: Float[Tensor, "B C Z Y X"]) -> Tensor | list[Tensor]:
        """Logits ``(B, classes, Z, Y, X)``, or with deep supervision a list of them, finest first."""
        grid = self.token_grid(x.shape[2:])
        _, tokens = self.encode(self.embed(x) + self.positions(grid), grid)
        return self.decoder(as_map(tokens, grid))

    def _prefix(self) -> list[nn.Parameter]:
        return [extra for extra in (self.class_token, self.register_tokens) if extra is not None]


def as_size(lengths: Iterable[int]) -> Size:
    """Three lengths as plain integers."""
    z, y, x = (int(n) for n in lengths)
    return z, y, x


def as_map(tokens: Float[Tensor, "B L E"], grid: Size) -> Float[Tensor, "B E z y x"]:
    """Tokens in C order laid out as a volume."""
    z, y, x = grid
    return rearrange(tokens, "b (z y x) e -> b e z y x", z=z, y=y, x=x)


def default_decoder_widths(embed_dim: int, stages: int) -> list[int]:
    """Widths that fall geometrically from the embedding to 16 channels, in multiples of 8 (the rule of DNA's PatchDecode,
    with the number of classes replaced by a constant)."""
    ratio = FULL_RESOLUTION_WIDTH / embed_dim
    return [max(8, round(embed_dim * ratio ** (s / stages) / 8) * 8) for s in range(1, stages + 1)]
