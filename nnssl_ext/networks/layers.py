"""Learning rates that fall from an encoder's last layer to its first (BEiT, arXiv:2106.08254; DINOv2), and stochastic depth.

A layer is a block of a transformer or a stage of a convolutional encoder.
"""

from __future__ import annotations

import re

from torch import nn

from nnssl_ext.contracts import Backbone, OptimRule, TokenBackbone
from nnssl_ext.errors import NnsslError

_LAYER = re.compile(r"(eva\.blocks|encoder\.stages)\.(\d+)\.")
_TOKENS = ("class_token", "register_tokens", "eva.pos_embed")


def layer_numbers(network: nn.Module) -> dict[str, int]:
    """Prefixes of a network's parameter names, each with its place as BEiT counts: stem, tokens and positions 0, layer i is
    i + 1. What no prefix covers (final norms, decoder, heads) comes after the last layer. Empty for an encoder without
    layers that this module knows."""
    names = [name for name, _ in network.named_parameters()]
    layers = {match[0]: int(match[2]) + 1 for match in map(_LAYER.match, names) if match}
    if not layers:
        return {}
    first = (f"{network.key_to_stem}.", *(name for name in _TOKENS if name in names))
    return {**dict.fromkeys(first, 0), **{part: number for part, number in layers.items() if part not in first}}


def layer_decay_rules(backbone: Backbone, prefix: str, decay: float, stem_scale: float) -> tuple[OptimRule, ...]:
    """Rules that multiply the learning rate by ``decay ** (L + 1 - id)``, id being the place among L layers that
    `layer_numbers` gives; the mask token's is 0. The stem, whose gradients are the noisiest, is multiplied by `stem_scale`
    besides. Final norms stay.

    Args:
        prefix: what the names of the backbone's parameters begin with in the method, e.g. ``backbone.``.
        decay: DINOv2: 0.9; 1 = none.
        stem_scale: DINOv2: 0.2; 1 = none.

    Raises:
        NnsslError: an encoder without layers that this module knows.
    """
    if decay == stem_scale == 1:
        return ()
    numbers = {f"network.{part}": number for part, number in layer_numbers(backbone.network).items()}
    if not numbers:
        raise NnsslError(
            f"{type(backbone.network).__name__} has no numbered layers to decay learning rates over",
            "set --layer_decay 1 --stem_scale 1",
        )
    last = max(numbers.values())
    if isinstance(backbone, TokenBackbone):
        numbers["mask_token"] = 0
    scales = {part: decay ** (last + 1 - number) for part, number in numbers.items()}
    scales[f"network.{backbone.network.key_to_stem}."] *= stem_scale
    return tuple(OptimRule(prefix + part, lr_scale=scale) for part, scale in scales.items() if scale != 1)


def set_stochastic_depth(backbone: Backbone, rate: float) -> None:
    """Give every transformer block the same probability of being skipped, as DINOv2 does, in place of the rates that the
    plans' network has.

    Raises:
        NnsslError: a backbone without transformer blocks.
    """
    from nnssl_ext.networks._timm import DropPath  # slow to import, and convolutional networks do not need it

    blocks = getattr(getattr(backbone.network, "eva", None), "blocks", None)
    if blocks is None:
        raise NnsslError(
            f"{type(backbone.network).__name__} has no transformer blocks for stochastic depth", "leave --drop_path out"
        )
    for block in blocks:
        block.drop_path1, block.drop_path2 = DropPath(rate), DropPath(rate)
