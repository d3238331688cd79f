"""Local corruptions of Models Genesis (Zhou et al., arXiv:2004.07882) as arXiv:2401.06473 uses them for dense contrast, batched.

What they draw comes from a generator on the CPU, seeded per sample, and is small, but for the noise in cuboids.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from nnssl_ext.views.corruptions import boxes_mask, tone_curve
from nnssl_ext.views.filters import SPATIAL, Seeds, Strength, Voxels

BLOCKS = 20
"""Edges of shuffled blocks are the view's over this, but at least `SHORTEST`."""
SHORTEST = 2
"""Voxels, where a view has as many (ours): in views of under 40 voxels the paper's blocks have one, which has no other place."""
KNOTS = 1024
"""Values of a Bezier curve between which it is interpolated."""
CUBOIDS, CUBOID_EDGES, MARGIN = 30, (10, 5), 3
"""Most noise cuboids, the view's edges over their shortest and longest ones, and voxels that they stay away from borders."""


def shuffle(voxels: Voxels, share: Strength, seeds: Seeds) -> Voxels:
    """Shuffle the voxels inside `share` of the blocks; one permutation serves all blocks of a sample, and all channels.

    The paper draws 5,000 blocks one after the other, anywhere, and lets them overlap; here they lie on a grid with a random
    origin, so that each keeps its values and all of them are moved by one gather.
    """
    size = voxels.shape[2:]
    edges = [max(min(SHORTEST, length), length // BLOCKS) for length in size]
    drawn = [_draw_shuffle(size, edges, wanted, seed) for wanted, seed in zip(share.tolist(), seeds, strict=True)]
    origins, chosen, moves = (
        torch.stack(part).to(voxels.device, non_blocking=True) for part in zip(*drawn, strict=True)
    )
    block, inside = torch.zeros_like(origins[:, :1, None, None]), torch.zeros_like(origins[:, :1, None, None])
    for axis, (length, edge) in enumerate(zip(size, edges, strict=True)):
        shape = [len(voxels), *(length if other == axis else 1 for other in range(3))]
        place = (torch.arange(length, device=voxels.device) + origins[:, axis, None]).view(shape)
        block = block * (length // edge + 2) + place // edge
        inside = inside * edge + place % edge
    active = chosen.gather(1, block.flatten(1))
    here = torch.arange(active.shape[1], device=voxels.device)
    source = torch.where(active, here + moves.gather(1, inside.flatten(1)), here)
    return voxels.flatten(2).gather(2, source[:, None].expand(-1, voxels.shape[1], -1)).view_as(voxels)


def _draw_shuffle(
    size: torch.Size, edges: list[int], share: float, seed: int
) -> tuple[Int[Tensor, " 3"], Bool[Tensor, " G"], Int[Tensor, " P"]]:
    """How far the grid of blocks begins before the view; which of its blocks, counted with those cut off at both ends, are
    shuffled; and by how many voxels of the flattened view each place of a block fetches its value."""
    generator = torch.Generator().manual_seed(seed)
    origin = torch.tensor([int(torch.randint(edge, (), generator=generator)) for edge in edges])
    grid = [length // edge + 2 for length, edge in zip(size, edges, strict=True)]
    whole = torch.ones(grid, dtype=torch.bool)
    for axis, (length, edge) in enumerate(zip(size, edges, strict=True)):
        first = torch.arange(grid[axis]) * edge - origin[axis]
        fits = (first >= 0) & (first + edge <= length)
        whole &= fits.view([-1 if other == axis else 1 for other in range(3)])
    numbers = whole.flatten().nonzero()[:, 0]
    wanted = numbers[torch.randperm(len(numbers), generator=generator)[: round(share * len(numbers))]]
    chosen = torch.zeros(whole.numel(), dtype=torch.bool)
    chosen[wanted] = True
    z, y, x = torch.meshgrid(*map(torch.arange, edges), indexing="ij")
    flat = ((z * size[1] + y) * size[2] + x).flatten()
    return origin, chosen, flat[torch.randperm(len(flat), generator=generator)] - flat


def bezier(voxels: Voxels, extent: Strength, seeds: Seeds) -> Voxels:
    """Tone curve between each channel's minimum and maximum: ``1 - extent`` of the identity plus `extent` of a cubic Bezier
    curve from (0, 0) to (1, 1) whose two other control points have uniform random coordinates. Such a curve never falls."""
    time = torch.linspace(0, 1, 2 * KNOTS, dtype=torch.float64)
    weights = torch.stack((3 * time * (1 - time) ** 2, 3 * time**2 * (1 - time), time**3))
    place = torch.linspace(0, 1, KNOTS, dtype=torch.float64)
    curves = torch.empty(len(seeds), KNOTS)
    for curve, part, seed in zip(curves, extent.tolist(), seeds, strict=True):
        points = torch.rand(2, 2, generator=torch.Generator().manual_seed(seed)).double()
        x, y = torch.cat((points, torch.ones(2, 1)), dim=1) @ weights
        right = torch.searchsorted(x, place).clamp(1, len(x) - 1)
        width = (x[right] - x[right - 1]).clamp(min=1e-12)
        tone = torch.lerp(y[right - 1], y[right], (place - x[right - 1]) / width)
        curve.copy_(torch.lerp(place, tone, part))
    return tone_curve(voxels, curves)


def inpaint(voxels: Voxels, count: Strength, seeds: Seeds) -> Voxels:
    """Fill `count` cuboids per sample with uniform noise between each channel's minimum and maximum, every voxel its own."""
    size, device = voxels.shape[2:], voxels.device
    boxes = torch.stack([_draw_cuboids(size, round(n), seed) for n, seed in zip(count.tolist(), seeds, strict=True)])
    noise, generator = torch.empty_like(voxels), torch.Generator(device)
    for sample, seed in zip(noise, seeds, strict=True):
        sample.uniform_(0, 1, generator=generator.manual_seed(seed))
    low, high = voxels.amin(SPATIAL, keepdim=True), voxels.amax(SPATIAL, keepdim=True)
    return torch.where(boxes_mask(boxes, size, device)[:, None], torch.lerp(low, high, noise), voxels)


def _draw_cuboids(size: torch.Size, count: int, seed: int) -> Int[Tensor, "K 2 3"]:
    """Lower and upper corners of `CUBOIDS` boxes, those beyond `count` empty. In views too small for the margin it shrinks."""
    generator, lengths = torch.Generator().manual_seed(seed), torch.tensor(size)
    shortest, longest = ((lengths // part).clamp(min=1) for part in CUBOID_EDGES)
    edges = shortest + (torch.rand(CUBOIDS, 3, generator=generator) * (longest - shortest + 1)).long()
    margin = ((lengths - edges) // 2).clamp(max=MARGIN)
    lower = margin + (torch.rand(CUBOIDS, 3, generator=generator) * (lengths - edges - 2 * margin + 1)).long()
    drawn = (torch.arange(CUBOIDS) < count)[:, None]
    return torch.stack((lower, lower + edges * drawn), dim=1)
