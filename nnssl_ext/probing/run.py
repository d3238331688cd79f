"""Teach the heads on some cases and score them on others, for one kind of features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm

from nnssl_ext.data.regions import read_region
from nnssl_ext.monitors.probe import nearest
from nnssl_ext.probing.cases import ProbeData
from nnssl_ext.probing.heads import Head, project, teach_linear, teach_nonlinear
from nnssl_ext.probing.scores import Scores, score
from nnssl_ext.probing.settings import ProbeSettings
from nnssl_ext.probing.table import Describe, Pyramid, Table, build_table
from nnssl_ext.records import Case, Region, Size

HEADS = ("linear", "non-linear", "kNN")
CHUNK = 65536
"""Voxels per pass through a head."""
QUERIES, QUERY_CHUNK = 131072, 4096
"""Voxels of one case whose neighbours are looked for, on a regular grid, and how many at a time; each is compared with every
taught voxel."""

Answer = Callable[[Pyramid, Size], Int[Tensor, "Z Y X"]]
"""From the standardised features of a volume of so many voxels to its labels, int16."""


@dataclass(frozen=True)
class Result:
    """What one kind of features reaches.

    Attributes:
        scores: head -> case -> scores.
        answers: head -> ``(Z, Y, X)`` labels of the first test case, for a picture.
        population: ``(K,)`` voxels per class in the training cases.
        channels: features per voxel.
    """

    scores: dict[str, dict[str, Scores]]
    answers: dict[str, Int[np.ndarray, "Z Y X"]]
    population: tuple[int, ...]
    channels: int


@torch.no_grad()
def measure(
    describe: Describe, data: ProbeData, settings: ProbeSettings, seed: int, device: torch.device, title: str
) -> Result:
    """All heads on one kind of features. The voxels that teach depend on the seed, not on the features.

    Args:
        describe: features of a volume.
        title: for the progress bar.

    Raises:
        NnsslError: a damaged case, or training cases of one class.
    """
    teaching = tqdm(data.train, f"{title}: features of cases that teach", unit="case", leave=False)
    table = build_table(
        (_whole(case) for case in teaching),
        len(data.train),
        data.labels.classes,
        data.labels.ignore,
        describe,
        settings,
        seed,
        device,
    )
    answers = teach(table, settings, seed)
    found: dict[str, dict[str, Scores]] = {name: {} for name in answers}
    pictured = {}
    for case in tqdm(data.test, f"{title}: scoring", unit="case", leave=False):
        region = _whole(case)
        assert region.labels is not None
        pyramid = table.standardise(describe(torch.from_numpy(region.voxels).to(device)))
        for name, answer in answers.items():
            labels = answer(pyramid, case.shape).cpu().numpy()
            found[name][case.identifier] = score(region.labels, labels, data.labels, case.spacing)
            if case is data.test[0]:
                pictured[name] = labels
    channels = sum(row.shape[1] for row in table.rows)
    return Result(found, pictured, tuple(table.population.tolist()), channels)


def teach(table: Table, settings: ProbeSettings, seed: int) -> dict[str, Answer]:
    """Head -> how it labels a volume."""
    linear = teach_linear(table.rows, table.labels, table.importance)
    nonlinear = teach_nonlinear(table.rows, table.labels, table.importance, table.represents, settings, seed)
    known = table.part(settings.neighbours_of, seed)
    keys, importance = torch.cat(known.rows, dim=1), known.importance

    def by_head(head: Head) -> Answer:
        def answer(pyramid: Pyramid, size: Size) -> Tensor:
            projected = project(head, pyramid)

            def classify(points: Tensor) -> Tensor:
                return head.combine([level.at(points, settings.interpolation) for level in projected]).argmax(dim=1)

            return _everywhere(classify, size, CHUNK, 1, table.labels.device)

        return answer

    def by_neighbours(pyramid: Pyramid, size: Size) -> Tensor:
        def classify(points: Tensor) -> Tensor:
            asked = torch.cat([level.at(points, settings.interpolation) for level in pyramid], dim=1)
            return nearest(keys, known.labels, asked, importance)

        return _everywhere(classify, size, QUERY_CHUNK, query_stride(size), table.labels.device)

    return dict(zip(HEADS, (by_head(linear), by_head(nonlinear), by_neighbours), strict=True))


def query_stride(size: Sequence[int]) -> int:
    """Voxels between those whose neighbours are looked for: one, or more in volumes of more than `QUERIES` voxels."""
    stride = 1
    while np.prod([-(-length // stride) for length in size]) > QUERIES:
        stride += 1
    return stride


def _everywhere(
    classify: Callable[[Tensor], Tensor], size: Size, chunk: int, stride: int, device: torch.device
) -> Int[Tensor, "Z Y X"]:
    """The classes of the middle voxels of cells of so many voxels along each axis, spread over the cells; int16.

    Args:
        classify: from ``(N, 3)`` voxels to their classes.
        chunk: voxels at a time.
    """
    axes = [(torch.arange(0, n, stride, device=device) + stride // 2).clamp(max=n - 1) for n in size]
    found = torch.empty([len(axis) for axis in axes], dtype=torch.int16, device=device)
    for part in found.view(-1).split(chunk):
        number = torch.arange(len(part), device=device) + part.storage_offset()
        places = torch.unravel_index(number, found.shape)
        part.copy_(classify(torch.stack([axis[place] for axis, place in zip(axes, places, strict=True)], dim=1)))
    for axis, length in enumerate(size):
        found = found.repeat_interleave(stride, dim=axis).narrow(axis, 0, length)
    return found


def _whole(case: Case) -> Region:
    return read_region(case, (0, 0, 0), case.shape, labels=True)
