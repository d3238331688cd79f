"""The coupled convex search for large displacements (Heinrich et al., MICCAI 2014; Siebert et al., ConvexAdam, TMI 2024).

Every cell of a coarse grid tries every displacement of a box. A cost volume holds the dissimilarity of each; cells then choose
their best displacement and are drawn, ever more strongly, to the smoothed choice of their neighbours. With a temperature
the choice is a soft one, and features can be trained through it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nnssl_ext.records import Size
from nnssl_ext.registration.pooling import geometric_mean
from nnssl_ext.registration.separable import Kernels, apply_kernels, smoothing_kernels
from nnssl_ext.registration.warp import Padding, warp

Features = Float[Tensor, "C z y x"]
Weights = Float[Tensor, "z y x"]
Cells = Float[Tensor, "3 z y x"]

REFERENCE_CHANNELS = 12
"""Costs are the mean squared difference over channels times this, whatever the number of channels: with MIND's 12 channels
they equal the sum that the convexAdam package couples in its coarse stage and the 12-fold mean of its Adam stage."""

COUPLINGS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
"""How strongly cells are drawn to their neighbours' choice, pass by pass. The package's, after a first, weak pull to zero
that decides between equal costs (it lets the first displacement of the box win, an extreme one)."""

PACKAGE_COUPLINGS = (0.0, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


def coupled_convex(
    fixed: Features,
    moving: Features,
    radius: Size,
    *,
    fixed_weight: Weights | None = None,
    moving_weight: Weights | None = None,
    cell_mm: Sequence[float] = (1.0, 1.0, 1.0),
    couplings: Sequence[float] = COUPLINGS,
    temperature: float | None = None,
    compatible: bool = False,
    memory_bytes: int = 2**30,
) -> Cells:
    """Displacements, in cells, that a coarse search finds.

    Args:
        fixed, moving: feature maps on one coarse grid.
        radius: cells to search to either side along z, y, x.
        fixed_weight, moving_weight: how much each cell counts, 0 to 1; what lies outside of `moving` never counts. What does
            not count costs what the cell's displacements cost on average: neither a match nor a way out.
        cell_mm: size of a cell; smoothing and coupling are isotropic in mm.
        couplings: one pass for each.
        temperature: None lets every cell take its best displacement (no gradient). A number takes the mean over all, weighted
            by softmax(-temperature * cost), and gradients reach both maps; 20 in CoRe (arXiv:2603.23694).
        compatible: the convexAdam package's border: zeros outside, which count.
        memory_bytes: roughly what the cost volume may take. One that is larger is computed again, slab by slab, in every
            pass, with the same result.
    """
    shape = fixed.shape[1:]
    kernels = smoothing_kernels(shape, 1, cell_mm, zero_border=compatible, device=fixed.device)
    mesh = _box(radius, fixed.device)
    scale = torch.tensor([size / geometric_mean(cell_mm) for size in cell_mm], device=fixed.device).view(3, 1)
    weights = None if compatible else _weights(fixed, fixed_weight, moving_weight)
    # Cost, coupled cost and one temporary.
    rows = max(int(memory_bytes / (3 * 4 * mesh.shape[1] * shape[1] * shape[2])), 1)
    slabs = [(lower, min(lower + rows, shape[0])) for lower in range(0, shape[0], rows)]

    def cost(lower: int, upper: int) -> Tensor:
        return _cost_slab(fixed, moving, radius, weights, kernels, lower, upper)

    kept = cost(*slabs[0]) if len(slabs) == 1 else None
    smooth = torch.zeros(3, *shape, device=fixed.device)
    for coupling in couplings:
        chosen = []
        for lower, upper in slabs:
            costs = cost(lower, upper) if kept is None else kept
            centre = smooth[:, lower:upper].reshape(3, -1)
            chosen.append(_choose(costs, mesh, centre, coupling, scale, temperature).view(3, -1, *shape[1:]))
        smooth = apply_kernels(torch.cat(chosen, 1), kernels)
    return smooth


def consistent(
    forward: Cells, backward: Cells, iterations: int = 15, *, compatible: bool = False
) -> tuple[Cells, Cells]:
    """Two opposite fields, drawn to being each other's inverse by averaging each with what the other says, inverted.

    Args:
        forward, backward: in cells of one grid.
        iterations: 15 in the convexAdam package.
        compatible: the package's sampling, which stretches displacements by n / (n - 1) and sees zeros outside.
    """
    stretch = package_stretch(forward) if compatible else 1.0
    padding: Padding = "zeros" if compatible else "border"
    for _ in range(iterations):
        forward, backward = (
            (forward - warp(backward, forward * stretch, padding=padding)) / 2,
            (backward - warp(forward, backward * stretch, padding=padding)) / 2,
        )
    return forward, backward


def package_stretch(field: Cells) -> Float[Tensor, "3 1 1 1"]:
    """n / (n - 1) per axis: how far the convexAdam package looks for a displacement of 1, so what it finds is too short."""
    lengths = torch.tensor(field.shape[1:], dtype=field.dtype, device=field.device).view(3, 1, 1, 1)
    return lengths / (lengths - 1)


def _box(radius: Size, device: torch.device) -> Float[Tensor, "3 N"]:
    axes = [torch.arange(-reach, reach + 1, dtype=torch.float32, device=device) for reach in radius]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).reshape(3, -1)


def _weights(fixed: Features, fixed_weight: Weights | None, moving_weight: Weights | None) -> tuple[Weights, Weights]:
    everywhere = torch.ones(fixed.shape[1:], device=fixed.device)
    return (
        everywhere if fixed_weight is None else fixed_weight,
        everywhere if moving_weight is None else moving_weight,
    )


def _choose(
    costs: Float[Tensor, "N cells"],
    mesh: Float[Tensor, "3 N"],
    centre: Float[Tensor, "3 cells"],
    coupling: float,
    scale: Float[Tensor, "3 1"],
    temperature: float | None,
) -> Float[Tensor, "3 cells"]:
    """For every cell the displacement with the least ``cost + coupling * |displacement - centre|²``."""
    # |m - c|² without |c|², which is the same for all displacements of a cell
    steps, centre = mesh * scale, centre * scale
    coupled = torch.addmm(costs, (-2 * coupling * steps).T, centre).add_(coupling * steps.square().sum(0)[:, None])
    if temperature is None:
        return mesh[:, coupled.min(0).indices]
    return mesh @ torch.softmax(-temperature * coupled, 0)


def _cost_slab(
    fixed: Features,
    moving: Features,
    radius: Size,
    weights: tuple[Weights, Weights] | None,
    kernels: Kernels,
    lower: int,
    upper: int,
) -> Float[Tensor, "N cells"]:
    """Costs of all displacements for the rows from `lower` to `upper`, smoothed twice over neighbours."""
    depth = fixed.shape[1]
    first, last = max(lower - 2, 0), min(upper + 2, depth)  # two passes reach two cells far
    twice = (
        torch.linalg.matrix_power(kernels[0], 2)[lower:upper, first:last],
        torch.linalg.matrix_power(kernels[1], 2),
        torch.linalg.matrix_power(kernels[2], 2),
    )
    fixed = fixed[:, first:last]
    moving = _rows(moving, first - radius[0], last + radius[0], radius)
    if weights is not None:
        fixed_weight = weights[0][None, first:last]
        moving_weight = _rows(weights[1][None], first - radius[0], last + radius[0], radius)
    across = (2 * radius[1] + 1) * (2 * radius[2] + 1)
    cost = fixed.new_empty((2 * radius[0] + 1) * across, *fixed.shape[1:])

    def seen(shift: int) -> Tensor:
        return fixed_weight[0] * _shifts(moving_weight[:, shift : shift + fixed.shape[1]], radius)[0]

    visible: Tensor | float = 0.0
    for shift in range(2 * radius[0] + 1):
        part = moving[:, shift : shift + fixed.shape[1]]
        if torch.is_grad_enabled() and (fixed.requires_grad or moving.requires_grad):
            difference = checkpoint(_differences, fixed, part, radius, use_reentrant=False)
        else:
            difference = _differences(fixed, part, radius)
        here = slice(shift * across, (shift + 1) * across)
        if weights is None:
            cost[here] = difference
        else:
            visible = visible + seen(shift).sum(0)
            cost[here] = difference * seen(shift)
    typical = None if weights is None else cost.sum(0) / torch.as_tensor(visible).clamp(min=1e-6)
    smoothed = fixed.new_empty(len(cost), upper - lower, *fixed.shape[2:])
    for shift in range(2 * radius[0] + 1):
        here = slice(shift * across, (shift + 1) * across)
        # Were what does not count left out instead, displacements that show nothing would be the cheapest of all.
        whole = cost[here] if typical is None else torch.addcmul(cost[here], 1 - seen(shift), typical)
        smoothed[here] = apply_kernels(whole, twice)
    return smoothed.flatten(1)


def _rows(volume: Features, first: int, last: int, radius: Size) -> Float[Tensor, "C _z _y _x"]:
    """Rows `first` to `last` with `radius` columns more at every side; zeros outside."""
    inside = volume[:, max(first, 0) : last]
    depth = volume.shape[1]
    return F.pad(inside, (radius[2], radius[2], radius[1], radius[1], max(-first, 0), max(last - depth, 0)))


def _shifts(moving: Float[Tensor, "C z Y X"], radius: Size) -> Float[Tensor, "C N z y x"]:
    """All displacements along y and x, as a view of the padded map."""
    height, width = moving.shape[2] - 2 * radius[1], moving.shape[3] - 2 * radius[2]
    windows = moving.unfold(2, height, 1).unfold(3, width, 1)  # C, z, Ny, Nx, y, x
    return windows.permute(0, 2, 3, 1, 4, 5).flatten(1, 2)


def _differences(fixed: Features, moving: Float[Tensor, "C z Y X"], radius: Size) -> Float[Tensor, "N z y x"]:
    """Squared differences for all displacements along y and x.

    Maps are taken apart at once: the gradient of picking one channel is as large as the map, so that picking them one by one
    takes time that grows with the square of their number.
    """
    total: Tensor | float = 0.0
    for one, other in zip(fixed.unbind(), moving.unbind(), strict=True):
        total = total + (one - _shifts(other[None], radius)[0]).square()
    assert isinstance(total, Tensor)
    return total * (REFERENCE_CHANNELS / len(fixed))
