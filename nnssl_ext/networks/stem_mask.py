"""Hiding channels between a network's stem and the rest of it."""

from __future__ import annotations

from typing import cast

from jaxtyping import Bool, Float
from torch import Tensor, nn


class StemMask:
    """Sets channels of what a network's stem puts out to 0, for as long as `hidden` names some.

    It is a forward hook: the network's parameters, their names and its exported weights stay what they are. Networks name
    their stem themselves (``key_to_stem``, ``keys_to_in_proj``): the first convolution with norm and activation of a ResEnc,
    the patch embedding of Primus and Swin UNETR.

    Attributes:
        width: channels that the stem puts out.
        hidden: ``(B, width)``, True where a sample's channel is hidden at every place, or None.
    """

    def __init__(self, network: nn.Module) -> None:
        stem, layers = cast(str, network.key_to_stem), cast(tuple[str, ...], network.keys_to_in_proj)
        self.width = len(cast(Tensor, network.get_submodule(layers[0]).weight))
        self.hidden: Bool[Tensor, "B C"] | None = None
        network.get_submodule(stem).register_forward_hook(self._hide)

    def _hide(self, stem: nn.Module, inputs: tuple[Tensor, ...], maps: Float[Tensor, "B C z y x"]) -> Tensor:
        return maps if self.hidden is None else maps.masked_fill(self.hidden[..., None, None, None], 0)
