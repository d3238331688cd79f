"""How frozen features are asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nnssl_ext.errors import NnsslError


@dataclass(frozen=True)
class ProbeSettings:
    """How features are read and what is taught on them. Numbers without a source are our choice, made for minutes on a CPU.

    Attributes:
        pyramid: what describes a voxel: all levels of the encoder, or of the decoder and the encoder's coarsest (for methods
            that train a decoder; vox2vec's features are such a pyramid).
        interpolation: between feature voxels; "nearest" is vox2vec's, and shows tokens as blocks.
        voxels: how many teach, of all cases together.
        neighbours_of: among how many of these nearest neighbours are looked for.
        width: channels of the non-linear head.
        iterations: steps of its training with Adam (vox2vec: 45000).
        batch_size: voxels per step.
        lr: learning rate of the first step, falling to 0 as half a cosine (vox2vec: 3e-4, constant).
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
