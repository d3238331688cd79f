"""Batches of regions, a pure function of seed and sample number.

Sample number ``n = step * batch_size * world_size + rank * batch_size + i`` fixes the case (by a permutation per epoch)
and everything random about it (``np.random.default_rng([seed, n])``, and its quantile within the step). So a resumed run
continues with the same batches, two processes with batch B see what one with 2B sees, and the number of workers changes nothing.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, reduce
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nnssl_ext.contracts import ViewDraw, ViewPolicy
from nnssl_ext.data.regions import read_region
from nnssl_ext.errors import NnsslError
from nnssl_ext.geometry.affines import bounding_box
from nnssl_ext.geometry.boxes import hull
from nnssl_ext.records import Case, Region


@dataclass(frozen=True)
class RegionBatch:
    """One region per case, on the CPU, and what to cut from it.

    Attributes:
        voxels: ``(B, C, Z, Y, X)`` float32, regions zero-padded at their far ends to the largest of the batch.
        lower: ``(B, 3)`` case voxel of each region's first voxel.
        case_shape: ``(B, 3)`` voxels of each case.
        spacing: ``(B, 3)`` mm of each case's voxels.
        cases: ``B`` identifiers.
        draws: per sample, its views.
        labels: ``(B, Z, Y, X)`` of the same voxels, padded alike, or None.
    """

    voxels: Float[Tensor, "B C Z Y X"]
    lower: Int[Tensor, "B 3"]
    case_shape: Int[Tensor, "B 3"]
    spacing: Float[Tensor, "B 3"]
    cases: tuple[str, ...]
    draws: tuple[tuple[ViewDraw, ...], ...]
    labels: Int[Tensor, "B Z Y X"] | None = None

    def __str__(self) -> str:
        size = "x".join(map(str, self.voxels.shape[2:]))
        return f"{len(self.cases)} region(s), padded to {size} voxels, of {', '.join(self.cases)}"

    def pin_memory(self) -> RegionBatch:
        """The same in page-locked memory, from where copies to a GPU run beside computation."""
        labels = None if self.labels is None else self.labels.pin_memory()
        return replace(self, voxels=self.voxels.pin_memory(), labels=labels)


class RegionLoader:
    """Iterable over `RegionBatch`; its length is the number of steps. See `make_loader`."""

    def __init__(self, loader: Iterable[RegionBatch | NnsslError], steps: int) -> None:
        self._loader, self._steps = loader, steps

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[RegionBatch]:
        for batch in self._loader:
            if isinstance(batch, NnsslError):
                raise batch
            yield batch


def make_loader(
    cases: Sequence[Case],
    policy: ViewPolicy,
    *,
    seed: int,
    start_step: int,
    steps: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    accumulate: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
) -> RegionLoader:
    """The batches of `steps` steps from `start_step` on, for one process.

    Args:
        cases: what to read; every case once per epoch, in an order that depends on seed and epoch.
        policy: draws each sample's views.
        batch_size: cases per step and process.
        rank, world_size: this process and the number of processes.
        accumulate: batches per optimiser step: the quantiles of all their samples are stratified together.
        workers: reading processes; 0 reads in this one, which suits small machines.
        pin_memory: page-lock batches, for training on a GPU.

    Raises:
        NnsslError: there are no cases, or the policy refuses one (its size, say); while iterating, a case cannot be read
            (also from a worker, and by name).
    """
    if not cases:
        raise NnsslError("there is no case to train on", "check the dataset, or the file given to --cases")
    for case in {(case.shape, case.spacing): case for case in cases}.values():
        policy.draw(case, np.random.default_rng(seed), 0.5)  # a refusal should not wait for the case's turn
    loader: DataLoader[Any] = DataLoader(
        _Samples(tuple(cases), policy, seed, batch_size * world_size * accumulate),
        batch_sampler=_Numbers(start_step, steps, batch_size, rank, world_size),
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        worker_init_fn=_begin_reading,
        generator=torch.Generator(),  # its own: torch would draw the workers' seeds from the global stream
    )
    return RegionLoader(loader, steps)


@dataclass(frozen=True)
class _Numbers:
    """The sample numbers of each step of one process."""

    start_step: int
    steps: int
    batch_size: int
    rank: int
    world_size: int

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start_step, self.start_step + self.steps):
            first = (step * self.world_size + self.rank) * self.batch_size
            yield list(range(first, first + self.batch_size))


@dataclass(frozen=True)
class _Samples(Dataset[tuple[Region, tuple[ViewDraw, ...]] | NnsslError]):
    cases: tuple[Case, ...]
    policy: ViewPolicy
    seed: int
    per_step: int

    def __getitem__(self, number: int) -> tuple[Region, tuple[ViewDraw, ...]] | NnsslError:
        epoch, position = divmod(number, len(self.cases))
        case = self.cases[_order(self.seed, epoch, len(self.cases))[position]]
        try:
            rng = np.random.default_rng([self.seed, number])
            draws = self.policy.draw(case, rng, self._quantile(number, rng))
            box = reduce(hull, (bounding_box(draw.affine, draw.size) for draw in draws))
            return read_region(case, box.lower, box.upper, labels=getattr(self.policy, "labels", False)), draws
        except NnsslError as error:
            return error  # raised in a worker it would reach the user buried in a traceback

    def _quantile(self, number: int, rng: np.random.Generator) -> float:
        step, position = divmod(number, self.per_step)
        stratum = np.random.default_rng([self.seed, step, 2]).permutation(self.per_step)[position]
        return float((stratum + rng.random()) / self.per_step)


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> Int[np.ndarray, " count"]:
    # The trailing 1 keeps this stream apart from every sample's own, and the 2 above the strata.
    return np.random.default_rng([seed, epoch, 1]).permutation(count)


def _collate(samples: list[tuple[Region, tuple[ViewDraw, ...]] | NnsslError]) -> RegionBatch | NnsslError:
    read: list[tuple[Region, tuple[ViewDraw, ...]]] = []
    for sample in samples:
        if isinstance(sample, NnsslError):
            return sample
        read.append(sample)
    regions = [region for region, _ in read]
    largest = np.max([region.voxels.shape for region in regions], axis=0)
    voxels = torch.zeros(len(regions), *largest.tolist())
    for target, region in zip(voxels, regions, strict=True):
        z, y, x = region.voxels.shape[1:]
        target[:, :z, :y, :x] = torch.from_numpy(region.voxels)
    labels = None
    if regions[0].labels is not None:
        labels = torch.zeros(len(regions), *voxels.shape[2:], dtype=torch.int16)
        for row, region in zip(labels, regions, strict=True):
            z, y, x = region.voxels.shape[1:]
            row[:z, :y, :x] = torch.from_numpy(region.labels)
    return RegionBatch(
        voxels=voxels,
        lower=torch.tensor([region.lower for region in regions]),
        case_shape=torch.tensor([region.case.shape for region in regions]),
        spacing=torch.tensor([region.case.spacing for region in regions]),
        cases=tuple(region.case.identifier for region in regions),
        draws=tuple(draws for _, draws in read),
        labels=labels,
    )


def _begin_reading(worker: int) -> None:
    """One thread; and a signal to the whole process group is for the training process, which ends its readers in its own time."""
    torch.set_num_threads(1)
    for name in ("SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
