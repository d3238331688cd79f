"""The layer that tells labels: nnU-Net's own, a 1x1x1 convolution of the decoder's finest map, alike in all our networks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import cast

from torch import Tensor, nn

NAME = re.compile(r"decoder\.seg_layers\.(\d+)\.")
"""One layer per map of the decoder, the finest last; all but the last exist for deep supervision."""


def segmentation_layer(network: nn.Module) -> tuple[str, nn.Conv3d]:
    """Its parameters' prefix in the network, and the layer."""
    layers = _layers(network)
    return f"decoder.seg_layers.{len(layers) - 1}.", cast(nn.Conv3d, layers[-1])


def tell_labels(network: nn.Module, classes: int) -> None:
    """Give the network a new layer for so many classes, the background included."""
    layers = _layers(network)
    layers[-1] = nn.Conv3d(cast(nn.Conv3d, layers[-1]).in_channels, classes, kernel_size=1)


def trained_layer(weights: Mapping[str, Tensor], not_pretrained: frozenset[str]) -> dict[str, Tensor]:
    """The layer's weight and bias in a checkpoint; empty where there is none or no training touched it."""
    numbers = [int(found[1]) for found in map(NAME.match, weights) if found]
    prefix = f"decoder.seg_layers.{max(numbers, default=-1)}."
    layer = {name: value for name, value in weights.items() if name.startswith(prefix)}
    return {} if not_pretrained & layer.keys() else layer


def _layers(network: nn.Module) -> nn.ModuleList:
    return cast(nn.ModuleList, cast(nn.Module, network.decoder).seg_layers)
