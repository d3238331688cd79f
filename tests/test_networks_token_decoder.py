"""The light decoder: places, positions and what it can learn from."""

from __future__ import annotations

import torch
from network_plans import primus_plans
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nnssl_ext.networks.build import build_backbone
from nnssl_ext.networks.eva import rotary_positions, run_blocks
from nnssl_ext.networks.token_decoder import TokenDecoder

GRID = (3, 4, 2)


def test_visible_tokens_return_to_their_places_and_mask_tokens_fill_the_rest() -> None:
    decoder = TokenDecoder(5, 12, depth=0, num_heads=1, out_dim=12)
    decoder.eva.norm = decoder.project_out = nn.Identity()
    visible = torch.randn(2, 3, 5)
    ids = torch.tensor([[0, 7, 23], [4, 5, 6]])
    out = decoder(visible, ids, GRID)
    for sample in range(2):
        for place in range(24):
            expected = decoder.mask_token[0, 0]
            if place in ids[sample]:
                expected = decoder.project_in(visible[sample, ids[sample].tolist().index(place)])
            torch.testing.assert_close(out[sample, place], expected)


def test_order_of_the_visible_tokens_does_not_matter() -> None:
    decoder = TokenDecoder(5, 12, depth=2, num_heads=2, out_dim=7).eval()
    visible, ids = torch.randn(1, 6, 5), torch.randperm(24)[None, :6]
    order = torch.randperm(6)
    torch.testing.assert_close(
        decoder(visible, ids, GRID), decoder(visible[:, order], ids[:, order], GRID), atol=1e-6, rtol=1e-5
    )


def stirred(depth: int, num_heads: int) -> TokenDecoder:
    """A decoder whose blocks do something: fresh ones are near the identity."""
    decoder = TokenDecoder(5, 12, depth=depth, num_heads=num_heads, out_dim=7).eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return decoder


def test_only_relative_positions_matter() -> None:
    """The blocks of the decoder, on one piece of content at three places of the grid."""
    decoder = stirred(depth=2, num_heads=2)
    content = torch.randn(1, 12, 12)
    rows = rotary_positions(GRID, decoder.head_dim, content.device)
    flat = torch.arange(24).reshape(GRID)
    here, down, right, turned = (
        run_blocks(decoder.eva, content, rows, ids.reshape(1, -1))
        for ids in (flat[:2, :3], flat[1:, :3], flat[:2, 1:], flat[:2, :3].flip(0))
    )
    torch.testing.assert_close(here, down, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(here, right, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(here, turned, atol=1e-3)


def test_axes_of_the_grid_keep_their_order() -> None:
    """The same tokens at the same places of a larger grid, all of them visible."""
    decoder, visible = stirred(depth=1, num_heads=1), torch.randn(1, 24, 5)
    rows = rotary_positions((3, 4, 5), decoder.head_dim, visible.device)
    piece = torch.arange(60).reshape(3, 4, 5)[..., :2].reshape(1, -1)
    expected = decoder.project_out(run_blocks(decoder.eva, decoder.project_in(visible), rows, piece))
    found = decoder(visible, torch.arange(24)[None], GRID)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_it_learns_to_tell_places_apart() -> None:
    """From content-free tokens: the target depends on the distance to the one visible token only."""
    torch.manual_seed(0)
    decoder = TokenDecoder(1, 24, depth=2, num_heads=2, out_dim=1)
    optimiser = torch.optim.AdamW(decoder.parameters(), lr=3e-3)
    grid = (4, 4, 4)
    coordinates = torch.cartesian_prod(*[torch.arange(4.0)] * 3)
    for step in range(150):
        ids = torch.randint(64, (8, 1))
        distance = (coordinates[None] - coordinates[ids]).abs().sum(-1)
        target = (distance <= 1).float()
        loss = (decoder(torch.ones(8, 1, 1), ids, grid)[..., 0] - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step == 0:
            first = loss.item()
    assert loss.item() < 0.5 * min(first, target.var().item())


def test_a_masked_step_costs_less_than_two_fifths_of_a_full_one() -> None:
    """Operations of forward and backward of a whole MAE step on PrimusS-like proportions, 75 % of 216 tokens hidden."""
    plans = primus_plans(embed_dim=96, eva_depth=12, eva_numheads=4, input_shape=[24] * 3)
    backbone, decoder = build_backbone(plans, "3d_fullres", 1), TokenDecoder(96, 48, 2, 2, 64)
    x = torch.randn(1, 1, 24, 24, 24)
    counts = []
    for hidden in (162, 0):
        mask = (torch.arange(216) < hidden).reshape(1, 6, 6, 6)
        with FlopCounterMode(display=False) as counter:
            tokens, ids = backbone.forward_visible(x, mask)
            decoder(tokens, ids, (6, 6, 6)).square().mean().backward()
        counts.append(counter.get_total_flops())
    assert counts[1] / counts[0] > 2.5
