"""How well frozen features register labelled cases with each other, asked now and then: Dice of the warped labels at one
smoothness, beside the same network with random weights. Random features register too, so only the gain over them is learned.

Pairs are neighbours by name, fixed i with moving i + 1, without alignment, brought to one grid around their middles, edges
repeated. They are for selection: the cases that are reported later belong to no run that they judge.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nnssl_ext.contracts import Backbone
from nnssl_ext.data.regions import read_region
from nnssl_ext.errors import NnsslError
from nnssl_ext.records import Case, Region, Size
from nnssl_ext.registration.extraction import ExtractionSettings, extract
from nnssl_ext.registration.measures import dice
from nnssl_ext.registration.projection import joint_pca
from nnssl_ext.registration.smoothness import smoothness
from nnssl_ext.registration.solver import SDLOGJ, SolverSettings, register_features
from nnssl_ext.registration.warp import warp

SOLVER = SolverSettings(sdlogj=SDLOGJ, iterations=40)
"""Half of ConvexAdam's iterations."""


class RegistrationProbe:
    """The labelled pairs of a run, chosen once.

    Args:
        cases: candidates.
        pairs: how many pairs of neighbours, spread evenly over the cases.
        level: of the network, see `ExtractionSettings`.
        tile: voxels per pass where a case needs several.
        ignore: label that is no structure, if there is one.

    Raises:
        NnsslError: fewer than two cases.
    """

    def __init__(self, cases: Sequence[Case], pairs: int, level: str, tile: Size, ignore: int | None = None) -> None:
        if len(cases) < 2:
            raise NnsslError(f"{len(cases)} case(s) to register", "give at least two labelled cases")
        neighbours = list(pairwise(sorted(cases, key=lambda case: case.identifier)))
        chosen = np.linspace(0, len(neighbours) - 1, min(pairs, len(neighbours))).round().astype(int)
        self.pairs = [neighbours[number] for number in chosen]
        self.extraction, self.tile, self.ignore = ExtractionSettings(level), tile, ignore

    def say(self, backbone: Backbone, device: torch.device) -> dict[str, float]:
        """``registration_dice``: mean over labels and pairs; ``registration_sdlogj``: the smoothness that was reached.

        The backbone is left in the mode it was in; no random number of the run is used.
        """
        assert isinstance(backbone, nn.Module)
        was_training = backbone.training
        backbone.eval()
        figures = [self._register(fixed, moving, backbone, device) for fixed, moving in self.pairs]
        backbone.train(was_training)
        told = [figure for figure in figures if np.isfinite(figure).all()] or [(np.nan, np.nan)]
        overlap, roughness = np.mean(told, axis=0)
        return {"registration_dice": float(overlap), "registration_sdlogj": float(roughness)}

    def _register(self, fixed: Case, moving: Case, backbone: Any, device: torch.device) -> tuple[float, float]:
        regions = [read_region(case, (0, 0, 0), case.shape, labels=True) for case in (fixed, moving)]
        z, y, x = np.max([case.shape for case in (fixed, moving)], axis=0).tolist()
        images, inside, labels = zip(*(_centred(region, (z, y, x)) for region in regions), strict=True)
        masks = [torch.from_numpy(mask).to(device) for mask in inside]
        maps = [extract(backbone, torch.from_numpy(image).to(device), self.extraction, self.tile) for image in images]
        if not all(torch.isfinite(found.values).all() for found in maps):
            return float("nan"), float("nan")  # told as such: nothing that is only asked ends a run
        features = [found.on_grid((z, y, x)) for found in joint_pca(maps[0], maps[1], masks[0], masks[1])]
        found = register_features(features[0], features[1], fixed.spacing, SOLVER, foreground=masks[0])
        field = found.displacement_voxels
        warped = warp(torch.from_numpy(labels[1]).float().to(device)[None], field, "nearest", "zeros")[0]
        present = sorted(set(np.unique(labels[0])) - {0, self.ignore})
        scores = dice(labels[0], _whole(warped), [int(label) for label in present])
        rough = smoothness(field, masks[0]).sdlogj
        return float(np.mean(list(scores.values()))) if scores else float("nan"), rough


def _centred(
    region: Region, size: Size
) -> tuple[Float[np.ndarray, "C Z Y X"], Bool[np.ndarray, "Z Y X"], Int[np.ndarray, "Z Y X"]]:
    """Image (edges repeated), where it lies, and labels (0 beyond) in the middle of a larger grid."""
    assert region.labels is not None
    room = [length - own for length, own in zip(size, region.labels.shape, strict=True)]
    margin = [(extra // 2, extra - extra // 2) for extra in room]
    image = np.pad(region.voxels, [(0, 0), *margin], mode="edge")
    return image, np.pad(np.ones(region.labels.shape, bool), margin), np.pad(region.labels, margin)


def _whole(labels: Float[Tensor, "Z Y X"]) -> Int[np.ndarray, "Z Y X"]:
    return labels.round().to(torch.int16).cpu().numpy()
