"""How frozen features are asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nnssl_ext.errors import NnsslError


@dataclass(frozen=True)
class ProbeSettings:
    """Numbers are our choice, made for minutes on a CPU, where no source is named.

    Attributes:
        pyramid: what describes a voxel: all levels of the encoder, or of the decoder and the encoder's coarsest (for methods
            that train a decoder; vox2vec's features are such a pyramid).
        interpolation: between feature voxels; "nearest" is vox2vec's, and shows tokens as blocks.
        voxels: that teach, of all cases together.
        neighbours_of: of these voxels, as many are searched for nearest neighbours.
        width: channels of the non-linear head.
        iterations, batch_size, lr: of its training: Adam, half a cosine to 0. vox2vec's is 45000 steps at 3e-4.
        controls: networks with random weights; their figures are averaged.
    """

    pyramid: Literal["encoder", "decoder"] = "encoder"
    interpolation: Literal["linear", "nearest"] = "linear"
    voxels: int = 16384
    neighbours_of: int = 4096
    width: int = 64
    iterations: int = 1000
    batch_size: int = 1024
    lr: float = 3e-3
    controls: int = 3

    def __post_init__(self) -> None:
        for name in ("voxels", "neighbours_of", "width", "iterations", "batch_size", "lr", "controls"):
            if getattr(self, name) <= 0:
                raise NnsslError(f"--{name} {getattr(self, name)}", "give a number above 0")
