"""What is compared: the checkpoint's features, those of the same network with random weights, and intensities."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from nnssl_ext.probing.settings import ProbeSettings
from nnssl_ext.probing.table import Describe
from nnssl_ext.registration.encoder import Encoder, Source, trained_encoder, untrained_encoder
from nnssl_ext.registration.extraction import extract_pyramid

PRETRAINED, RANDOM, INTENSITY = "pretrained", "random weights", "intensity"


@dataclass(frozen=True)
class Arm:
    """One kind of features.

    Attributes:
        name: in tables.
        about: one phrase.
        makers: of the network, or of None for intensities; one per repetition, over which figures are averaged. They are called
            one at a time.
    """

    name: str
    about: str
    makers: tuple[Callable[[], Encoder | None], ...]


def arms_of(source: Source, channels: int, settings: ProbeSettings, device: torch.device) -> list[Arm]:
    """The checkpoint and its controls."""
    untrained = tuple(partial(untrained_encoder, source, device, seed, channels) for seed in range(settings.controls))
    return [
        Arm(PRETRAINED, str(source.pretrained), (partial(trained_encoder, source, device, channels),)),
        Arm(RANDOM, f"the same network as initialised, {settings.controls} seeds", untrained),
        Arm(INTENSITY, "normalised intensities of 3x3x3 voxels", (lambda: None,)),
    ]


def describer(encoder: Encoder | None, settings: ProbeSettings) -> Describe:
    """A function from volumes to features; without an encoder, to intensities.

    Raises:
        NnsslError: the decoder is asked for, but was not trained.
    """
    if encoder is None:
        return lambda volume: (Neighbourhoods.of(volume),)
    decoder = settings.pyramid == "decoder"
    if decoder:
        encoder.require_decoder()
    return lambda volume: extract_pyramid(encoder.backbone, volume, encoder.patch_size, decoder)


@dataclass(frozen=True)
class Neighbourhoods:
    """The intensities of every voxel and its 26 neighbours, gathered when they are asked for.

    Attributes:
        windows: ``(C, Z, Y, X, 3, 3, 3)``, a view of the volume with its border repeated, so that it takes no more than that.
    """

    windows: Float[Tensor, "C Z Y X 3 3 3"]

    @classmethod
    def of(cls, volume: Float[Tensor, "C Z Y X"]) -> Neighbourhoods:
        """Those of one volume."""
        padded = functional.pad(volume[None], (1,) * 6, mode="replicate")[0]
        return cls(padded.unfold(1, 3, 1).unfold(2, 3, 1).unfold(3, 3, 1))

    def at(self, points: Int[Tensor, "N 3"], mode: Literal["linear", "nearest"] = "linear") -> Float[Tensor, "N _D"]:
        """The ``27 C`` intensities around some voxels z, y, x; these are whole, so both modes are the same."""
        z, y, x = points.T
        return self.windows[:, z, y, x].flatten(2).permute(1, 2, 0).flatten(1)


@contextmanager
def frozen(encoder: Encoder | None) -> Iterator[None]:
    """Make sure that a network leaves as it came.

    Raises:
        RuntimeError: a weight or buffer changed, or it was not in evaluation mode.
    """
    if encoder is None:
        yield
        return
    module = cast(nn.Module, encoder.backbone)
    before = fingerprint(module)
    yield
    if any(part.training for part in module.modules()) or fingerprint(module) != before:
        raise RuntimeError(f"probing changed {encoder.weights}")


def fingerprint(module: nn.Module) -> str:
    """SHA-256 of all weights and buffers, bit by bit."""
    digest = hashlib.sha256()
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
