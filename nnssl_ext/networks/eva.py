"""EVA-02 blocks (arXiv 2303.11331) over any set of tokens of a 3D grid. Token order is C order of ``z, y, x``."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nnssl_ext.errors import NnsslError
from nnssl_ext.networks._timm import Eva, build_rotary_pos_embed
from nnssl_ext.records import Size


def make_blocks(
    embed_dim: int,
    depth: int,
    num_heads: int,
    grid: Size | None = None,
    prefix_tokens: int = 0,
    drop_path_rate: float = 0.0,
    init_values: float | None = 0.1,
    scale_attn_inner: bool = True,
) -> Eva:
    """The transformer of DNA's Primus, initialised as there.

    Args:
        grid: token grid of its learned positions ``pos_embed (1, tokens, E)``; None for no learned positions.
        prefix_tokens: tokens before the grid's own (class, registers), which have no position.

    Raises:
        NnsslError: a width per head that rotary positions on three axes cannot use.
    """
    if embed_dim % num_heads or embed_dim // num_heads % 6:
        raise NnsslError(
            f"embed_dim {embed_dim} with {num_heads} heads: rotary positions on three axes need a multiple of 6 per head",
            "choose embed_dim and num_heads so that embed_dim / num_heads is a multiple of 6",
        )
    eva = Eva(
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        ref_feat_shape=grid or (1, 1, 1),
        use_abs_pos_emb=grid is not None,
        use_rot_pos_emb=False,  # DNA's is fixed to one grid; ours comes from `rotary_positions`
        drop_path_rate=drop_path_rate,
        init_values=init_values,
        scale_attn_inner=scale_attn_inner,
    )
    for block in eva.blocks:
        block.attn.num_prefix_tokens = prefix_tokens
    return eva


def rotary_positions(grid: Size, head_dim: int, device: torch.device) -> Float[Tensor, "L 2*{head_dim}"]:
    """Sines and cosines (concatenated) that rotate queries and keys, one row per token of the grid.

    The angle depends on the token's index along each axis, in tokens of the reference network: a smaller grid is a piece of a
    larger one, it is not stretched over it.
    """
    return torch.cat(build_rotary_pos_embed(list(grid), dim=head_dim * 2 // 3, in_pixels=False, device=device), dim=-1)


def select_rows(rows: Float[Tensor, "B L D"], ids: Int[Tensor, "B V"]) -> Float[Tensor, "B V D"]:
    """Row ``ids[b, v]`` of sample b."""
    return rows.gather(1, ids[..., None].expand(-1, -1, rows.shape[-1]))


def run_blocks(
    eva: Eva,
    tokens: Float[Tensor, "B N E"],
    rotary: Float[Tensor, "L D"],
    ids: Int[Tensor, "B V"] | None = None,
) -> Float[Tensor, "B N E"]:
    """All blocks and the final norm.

    Args:
        tokens: prefix tokens, then the tokens of the grid, or of `ids` alone.
        rotary: of the whole grid, see `rotary_positions`.
        ids: flat grid index of each token after the prefix, per sample; None when all are there in C order.
    """
    if ids is not None:
        rotary = rotary[ids][:, None]  # (B, 1, V, D): the same for all heads
    for block in eva.blocks:
        tokens = block(tokens, rope=rotary)
    return eva.norm(tokens)
