"""The light decoder of a masked autoencoder on tokens (He et al., arXiv 2111.06377), with rotary positions."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nnssl_ext.networks.eva import make_blocks, rotary_positions, run_blocks
from nnssl_ext.records import Size


class TokenDecoder(nn.Module):
    """Encoded visible tokens -> one output vector for every token of the grid.

    Args:
        encoder_dim: width of the encoded tokens.
        embed_dim, depth, num_heads: of this decoder; ``embed_dim / num_heads`` must be a multiple of 6.
        out_dim: values per token, e.g. channels x voxels of a token.
    """

    def __init__(self, encoder_dim: int, embed_dim: int, depth: int, num_heads: int, out_dim: int) -> None:
        super().__init__()
        self.head_dim = embed_dim // num_heads
        self.project_in = nn.Linear(encoder_dim, embed_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.eva = make_blocks(embed_dim, depth, num_heads)
        self.project_out = nn.Linear(embed_dim, out_dim)
        for tensor in (self.mask_token, self.project_in.weight, self.project_out.weight):
            nn.init.trunc_normal_(tensor, std=0.02)  # ViT, and the blocks' own initialisation
        nn.init.zeros_(self.project_in.bias)
        nn.init.zeros_(self.project_out.bias)

    def forward(
        self, visible: Float[Tensor, "B V E"], visible_ids: Int[Tensor, "B V"], grid: Size
    ) -> Float[Tensor, "B L O"]:
        """Fill hidden places of the C-ordered grid with the mask token and decode all of it."""
        visible = self.project_in(visible)
        batch, _, width = visible.shape
        tokens = self.mask_token.to(visible.dtype).expand(batch, grid[0] * grid[1] * grid[2], width)
        tokens = tokens.scatter(1, visible_ids[..., None].expand_as(visible), visible)
        return self.project_out(run_blocks(self.eva, tokens, rotary_positions(grid, self.head_dim, tokens.device)))
