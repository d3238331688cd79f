"""Learning rates that fall from an encoder's last layer to its first (BEiT, arXiv:2106.08254; DINOv2), and stochastic depth.

A layer is a block of a transformer or a stage of a convolutional encoder.
"""

from __future__ import annotations

import re
from typing import cast

from torch import nn

from nnssl_ext.contracts import Backbone, OptimRule
from nnssl_ext.errors import NnsslError

_LAYER = re.compile(r"network\.(eva\.blocks|encoder\.stages)\.(\d+)\.")
_TOKENS = ("mask_token", "network.class_token", "network.register_tokens", "network.eva.pos_embed")


def layer_decay_rules(backbone: Backbone, prefix: str, decay: float, stem_scale: float) -> tuple[OptimRule, ...]:
    """Rules that multiply the learning rate by ``decay ** (L + 1 - id)``: id 0 for the stem, tokens and positions, i + 1 for
    layer i of L. The stem, whose gradients are the noisiest, is multiplied by `stem_scale` besides. Final norms stay.

    Args:
        prefix: what the names of the backbone's parameters begin with in the method, e.g. ``backbone.``.
        decay: DINOv2: 0.9; 1 = none.
        stem_scale: DINOv2: 0.2; 1 = none.

    Raises:
        NnsslError: an encoder without layers that this module knows.
    """
    if decay == stem_scale == 1:
        return ()
    names = [name for name, _ in cast(nn.Module, backbone).named_parameters()]
    layers = {match[0]: int(match[2]) for match in map(_LAYER.match, names) if match}
    if not layers:
        raise NnsslError(
            f"{type(backbone.network).__name__} has no numbered layers to decay learning rates over",
            "set --layer_decay 1 --stem_scale 1",
        )
    stem = f"network.{backbone.network.key_to_stem}."
    last = 1 + max(layers.values())
    first = {stem: 0, **{name: 0 for name in _TOKENS if name in names}}
    scales = {part: decay ** (last + 1 - number) for part, number in first.items()}
    scales |= {part: decay ** (last - layer) for part, layer in layers.items() if part != stem}
    scales[stem] *= stem_scale
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
