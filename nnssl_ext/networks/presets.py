"""Sizes of the backbones that our planners offer. Loads no torch.

Primus S, B, M and L: Wald et al., "Primus", arXiv 2503.01835, with the regularisation of nnU-Net's Primus trainers. ResEnc M,
L and XL: Isensee et al., "nnU-Net Revisited", arXiv 2404.09556; the three differ only in the GPU memory that patch and
batch are planned for. The two Tiny presets are ours, sized by measurement for one CPU core. Swin UNETR: Hatamizadeh et al.,
arXiv 2201.01266, with the numbers of a thesis on SimSiam for CT (AGH, 2023, code: dittohed/exploring-ssl-for-ct).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PrimusPreset:
    """A Primus encoder.

    Attributes:
        embed_dim, depth, num_heads: width, blocks and attention heads. Rotary positions on three axes need
            ``embed_dim / num_heads`` to be a multiple of 6.
        token_size: voxels per token and axis; the paper's 8.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0 (nnU-Net's Primus trainers: 0.2).
        init_values: LayerScale at the start (nnU-Net's Primus trainers: 0.1).
        scale_attn_inner: LayerNorm between attention and its output projection (nnU-Net's Primus trainers: on).
    """

    embed_dim: int
    depth: int
    num_heads: int
    token_size: int = 8
    drop_path_rate: float = 0.2
    init_values: float = 0.1
    scale_attn_inner: bool = True


@dataclass(frozen=True)
class ResEncPreset:
    """A residual encoder U-Net.

    Attributes:
        memory_gb: GPU memory that patch and batch size are planned for.
        base_features, max_features: channels of the first stage, doubled per stage up to the maximum (nnU-Net: 32, 320).
        blocks_per_stage: residual blocks of each encoder stage; stages beyond the last entry repeat it (nnU-Net).
        max_stages: more stages are not used, or None for nnU-Net's own rule (pool until an edge is shorter than 8).
    """

    memory_gb: float
    base_features: int = 32
    max_features: int = 320
    blocks_per_stage: tuple[int, ...] = (1, 3, 4, 6, 6, 6)
    max_stages: int | None = None


@dataclass(frozen=True)
class SwinPreset:
    """A Swin UNETR of MONAI's.

    Attributes:
        feature_size: channels of the first encoder map, doubled from map to map.
        depths, num_heads: blocks and attention heads of the four stages.
        window_size: edge of the attention windows, in tokens.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.
    """

    feature_size: int = 48
    depths: tuple[int, int, int, int] = (2, 2, 2, 2)
    num_heads: tuple[int, int, int, int] = (3, 6, 12, 24)
    window_size: int = 7
    drop_path_rate: float = 0.1


PRIMUS_PRESETS = {
    # two patches of 40x56x40 voxels (1,400 tokens each), forward and backward: 0.8 CPU-seconds on a busy core (measured)
    "PrimusTiny": PrimusPreset(embed_dim=144, depth=4, num_heads=3, token_size=4, drop_path_rate=0.0),
    "PrimusS": PrimusPreset(embed_dim=396, depth=12, num_heads=6),
    "PrimusB": PrimusPreset(embed_dim=792, depth=12, num_heads=12),
    "PrimusM": PrimusPreset(embed_dim=864, depth=16, num_heads=12),
    "PrimusL": PrimusPreset(embed_dim=1056, depth=24, num_heads=16),
}

RESENC_PRESETS = {
    # 16-32-64 with blocks 1-2-2 reaches 0.86 Dice on hippocampus in one CPU-minute (measured)
    "ResEncTiny": ResEncPreset(
        memory_gb=2.0, base_features=16, max_features=64, blocks_per_stage=(1, 2, 2), max_stages=3
    ),
    "ResEncM": ResEncPreset(memory_gb=8.0),
    "ResEncL": ResEncPreset(memory_gb=24.0),
    "ResEncXL": ResEncPreset(memory_gb=40.0),
}

SWIN_PRESETS = {"SwinUNETR": SwinPreset()}
