"""What methods show to monitors of a feature map."""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor

CROPS, PLACES = 4, 256
"""Of how many crops, and of at most how many of their places: enough to see a spatial collapse (our choice)."""


def watched_places(features: Float[Tensor, "B C z y x"]) -> Float[Tensor, "N T C"]:
    """The ``"tokens"`` of `nnssl_ext.records.Step.watch`: the first crops' places, evenly thinned and detached."""
    places = features[:CROPS].detach().flatten(2).mT
    return places[:, :: math.ceil(places.shape[1] / PLACES)]
