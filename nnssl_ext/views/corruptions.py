"""Augmentations that draw more than a strength: a tone curve, a field, a network, boxes. Batched like all others.

What they draw comes from a generator on the CPU, seeded per sample, and is small; the volumes stay on their device.
"""

from __future__ import annotations

import itertools

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from nnssl_ext.views.filters import SPATIAL, Seeds, Strength, Voxels, mean_std, wide

CONTROL_POINTS = 10
"""Of a tone curve; MONAI's RandHistogramShift and with it 3DINO."""
FIELD_ORDER = 3
"""Total degree of a bias field's polynomial (Van Leemput et al. 1999; TorchIO, MONAI)."""
HIDDEN_CHANNELS, LAYERS = 2, 4
"""Of the random networks; Ouyang et al."""
BOXES, BOX_EDGES = 128, (0.1, 0.25)
"""Most boxes that a cut-out draws, and the range of their edges as shares of the view (at most 0.25: Swin UNETR)."""


def random_convolutions(voxels: Voxels, alpha: Strength, seeds: Seeds) -> Voxels:
    """Global intensity non-linear augmentation: mix in, with weight `alpha`, what a small random network makes of the image.

    Ouyang et al., "Causality-inspired single-source domain generalization for medical image segmentation",
    arXiv:2111.12525: 4 convolutions of 1 or 3 voxels with Gaussian weights and shifts, 2 channels between them, leaky
    ReLU. Instead of the Frobenius norm, each channel's mean and standard deviation are restored, as our images are
    z-scored. Teaches shapes that survive a change of modality.
    """
    batch, channels, *size = voxels.shape
    widths = [channels, *[HIDDEN_CHANNELS] * (LAYERS - 1), channels]
    drawn = zip(*(_random_layers(widths, seed) for seed in seeds), strict=True)
    image = voxels.reshape(1, batch * channels, *size)
    for number, layers in enumerate(drawn):
        weight, bias = (torch.cat(part).to(voxels.device, non_blocking=True) for part in zip(*layers, strict=True))
        image = F.conv3d(image, weight, bias, padding=1, groups=batch)
        if number < LAYERS - 1:
            image = F.leaky_relu(image)
    mixed = torch.lerp(_standardised(voxels), _standardised(image.view_as(voxels)), wide(alpha, voxels))
    mean, std = mean_std(voxels)
    return _standardised(mixed).mul_(std).add_(mean)


def histogram_shift(voxels: Voxels, extent: Strength, seeds: Seeds) -> Voxels:
    """Monotone piecewise linear tone curve between each channel's minimum and maximum: ``1 - extent`` of the identity plus
    `extent` of a curve through sorted uniform random values."""
    curves = torch.linspace(0, 1, CONTROL_POINTS).repeat(len(seeds), 1)
    for curve, share, seed in zip(curves, extent.tolist(), seeds, strict=True):
        inner = torch.rand(CONTROL_POINTS - 2, generator=torch.Generator().manual_seed(seed))
        curve[1:-1].lerp_(inner.sort().values, share)
    return tone_curve(voxels, curves)


def tone_curve(voxels: Voxels, curves: Float[Tensor, "B K"]) -> Voxels:
    """Map each channel by its sample's curve: K values at equal steps from the channel's minimum to its maximum, both taken as
    0 to 1, and straight lines between them."""
    last = curves.shape[1] - 1
    low, high = voxels.amin(SPATIAL, keepdim=True), voxels.amax(SPATIAL, keepdim=True)
    place = ((voxels - low) / (high - low).clamp(min=1e-7) * last).flatten(1)
    below = place.long().clamp(0, last - 1)  # below 0 only NaN, with which a step is skipped later
    curves = curves.to(voxels.device, non_blocking=True)
    tone = torch.lerp(curves.gather(1, below), curves.gather(1, below + 1), place - below)
    return tone.view_as(voxels).mul_(high - low).add_(low)


def bias_field(voxels: Voxels, extent: Strength, seeds: Seeds) -> Voxels:
    """Multiply what exceeds each channel's minimum by exp of a random cubic polynomial, of mean 1 over the view.

    Args:
        extent: largest coefficient, on coordinates from -1 to 1.
    """
    degrees = torch.cartesian_prod(*[torch.arange(FIELD_ORDER + 1)] * 3).sum(1).view(*[FIELD_ORDER + 1] * 3)
    drawn = [torch.rand(degrees.shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    coefficients = (torch.stack(drawn) * 2 - 1) * extent[:, None, None, None] * (degrees <= FIELD_ORDER)
    axes = [torch.linspace(-1, 1, n, device=voxels.device) for n in voxels.shape[2:]]
    powers = [axis ** torch.arange(FIELD_ORDER + 1, device=voxels.device)[:, None] for axis in axes]
    field = torch.einsum("bijk,iz,jy,kx->bzyx", coefficients.to(voxels.device, non_blocking=True), *powers).exp_()
    field /= field.mean((1, 2, 3), keepdim=True)
    low = voxels.amin(SPATIAL, keepdim=True)
    return voxels.sub_(low).mul_(field[:, None]).add_(low)


def gibbs(voxels: Voxels, extent: Strength, seeds: Seeds) -> Voxels:
    """Ringing of a truncated k-space: keep frequencies up to ``1 - extent`` of the corner's (which is sqrt 3 of Nyquist's)."""
    z, y, x = voxels.shape[2:]
    axes = [torch.fft.fftfreq(z), torch.fft.fftfreq(y), torch.fft.rfftfreq(x)]
    square = sum(f**2 for f in torch.meshgrid(*axes, indexing="ij"))
    assert isinstance(square, Tensor)
    kept = square <= (1 - extent[:, None, None, None]) ** 2 * 0.75 + 1e-6
    spectrum = torch.fft.rfftn(voxels, dim=SPATIAL)
    spectrum *= kept[:, None].to(voxels.device, non_blocking=True)
    return torch.fft.irfftn(spectrum, s=(z, y, x), dim=SPATIAL)


def cutout(voxels: Voxels, share: Strength, seeds: Seeds) -> Voxels:
    """Replace random boxes, that together have at most `share` of the voxels, by each channel's mean."""
    size = voxels.shape[2:]
    boxes = torch.stack([_draw_boxes(size, limit, seed) for limit, seed in zip(share.tolist(), seeds, strict=True)])
    hidden = boxes_mask(boxes, size, voxels.device)
    return torch.where(hidden[:, None], voxels.mean(SPATIAL, keepdim=True), voxels)


def boxes_mask(boxes: Int[Tensor, "B K 2 3"], size: torch.Size, device: torch.device) -> Bool[Tensor, "B Z Y X"]:
    """True inside any of a sample's boxes, which are given by lower and upper corners."""
    inside = []  # per axis (B, K, length), 1 where a box reaches
    for axis, length in enumerate(size):
        place, (lower, upper) = torch.arange(length), boxes[..., axis, None].unbind(2)
        inside.append(((place >= lower) & (place < upper)).float().to(device, non_blocking=True))
    return torch.einsum("bkz,bky,bkx->bzyx", *inside) > 0


def _draw_boxes(size: torch.Size, share: float, seed: int) -> Int[Tensor, "K 2 3"]:
    """Lower and upper corners; boxes beyond the share are empty."""
    generator, lengths = torch.Generator().manual_seed(seed), torch.tensor(size)
    low, high = BOX_EDGES
    edges = ((low + (high - low) * torch.rand(BOXES, 3, generator=generator)) * lengths).round().clamp(min=1)
    lower = (torch.rand(BOXES, 3, generator=generator) * (lengths - edges + 1)).floor()
    wanted = edges.prod(1).cumsum(0) <= share * lengths.prod()
    return torch.stack([lower, lower + edges * wanted[:, None]], dim=1).long()


def _random_layers(widths: list[int], seed: int) -> list[tuple[Tensor, Tensor]]:
    """Weights ``(out, in, 3, 3, 3)``, for kernels of 1 voxel zero but in the middle, and shifts, per layer."""
    generator, layers = torch.Generator().manual_seed(seed), []
    for before, after in itertools.pairwise(widths):
        weight = torch.randn(after, before, 3, 3, 3, generator=generator)
        if torch.rand((), generator=generator) < 0.5:
            weight = F.pad(weight[:, :, 1:2, 1:2, 1:2], [1] * 6)
        layers.append((weight, torch.randn(after, generator=generator)))
    return layers


def _standardised(voxels: Voxels) -> Voxels:
    mean = voxels.mean(SPATIAL, keepdim=True)
    return (voxels - mean) / voxels.std(SPATIAL, correction=0, keepdim=True).clamp(min=1e-7)
