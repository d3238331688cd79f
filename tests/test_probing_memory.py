"""What labelling a volume takes: chunks of voxels beside the volume, the network's maps and the labels, whatever its size; and
those labels are what all voxels at once would get."""

from __future__ import annotations

import math
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from nnssl_ext.probing import run
from nnssl_ext.probing import table as tables
from nnssl_ext.probing.arms import describer
from nnssl_ext.probing.run import HEADS, teach
from nnssl_ext.probing.settings import ProbeSettings
from nnssl_ext.probing.table import Describe, Pyramid, Table, build_table, draw_voxels
from nnssl_ext.records import Case, Region
from nnssl_ext.registration.extraction import FeatureMap

CPU = torch.device("cpu")
MAPS = ((8, 1), (12, 2), (20, 4), (6, 8))
"""Channels and stride of a network's levels."""
QUICK = ProbeSettings(voxels=600, neighbours_of=200, iterations=20, batch_size=128, width=64)


def resembling(volume: torch.Tensor) -> list[FeatureMap]:
    """Maps like a network's, from means of the volume's cells, far from mean 0 and deviation 1."""
    size = tuple(volume.shape[1:])
    padded = functional.pad(volume, [after for n in size[::-1] for after in (0, -n % 8)])
    return [
        FeatureMap.over(
            tuple(padded.shape[1:]),
            torch.cat([5 + 3 * torch.cos(functional.avg_pool3d(padded, stride) * (k + 1)) for k in range(channels)]),
        )
        for channels, stride in MAPS
    ]


def constant(length: int) -> list[FeatureMap]:
    """Maps of a cube, made without anything beside them."""
    return [FeatureMap.over((length,) * 3, torch.ones(k, *(length // stride,) * 3)) for k, stride in MAPS]


def stacked(volume: torch.Tensor) -> list[FeatureMap]:
    """The intensities around every voxel as 27 channels, by shifting the volume."""
    z, y, x = volume.shape[1:]
    padded = functional.pad(volume[None], (1,) * 6, mode="replicate")[0]
    parts = [padded[:, a : a + z, b : b + y, c : c + x] for a, b, c in product(range(3), repeat=3)]
    return [FeatureMap.over((z, y, x), torch.cat(parts))]


def whole(table: Table, pyramid: list[FeatureMap]) -> list[FeatureMap]:
    return [
        FeatureMap((level.values - m.view(-1, 1, 1, 1)) / s.view(-1, 1, 1, 1), level.stride, level.offset)
        for level, m, s in zip(pyramid, table.mean, table.std, strict=True)
    ]


def taught(describe: Describe, settings: ProbeSettings) -> Table:
    size = (18, 20, 16)
    rng = np.random.default_rng(0)
    voxels = rng.normal(size=(1, *size)).astype(np.float32)
    labels = (voxels[0] > 0.5).astype(np.int16) + (voxels[0] > 1.5)
    region = Region(voxels, (0, 0, 0), Case("a", Path(), 1, size, (1.0, 1.0, 1.0)), labels.astype(np.int16))
    return build_table([region], 1, 3, None, describe, settings, 0, CPU)


@pytest.mark.parametrize("features", ["maps", "intensities"])
@pytest.mark.parametrize("mode", ["linear", "nearest"])
def test_chunks_give_the_labels_of_all_voxels_at_once(monkeypatch, features, mode):
    settings = ProbeSettings(**{**vars(QUICK), "interpolation": mode})
    describe, twin = (resembling, resembling) if features == "maps" else (describer(None, settings), stacked)
    volume = torch.randn(1, 17, 22, 19, generator=torch.Generator().manual_seed(1))
    size = (17, 22, 19)
    table = taught(describe, settings)

    def labels(pyramid: Pyramid) -> dict[str, torch.Tensor]:
        return {name: answer(pyramid, size) for name, answer in teach(table, settings, 0).items()}

    with monkeypatch.context() as patch:
        patch.setattr(run, "CHUNK", 1001)
        patch.setattr(run, "QUERY_CHUNK", 1001)
        in_chunks = labels(table.standardise(describe(volume)))
    monkeypatch.setattr(run, "CHUNK", math.prod(size))
    monkeypatch.setattr(run, "QUERY_CHUNK", math.prod(size))
    monkeypatch.setattr(tables, "COARSE", 0)
    at_once = labels(whole(table, twin(volume)))
    assert in_chunks.keys() == set(HEADS)
    for name, found in in_chunks.items():
        assert found.dtype == torch.int16 and found.shape == size and len(found.unique()) == 3
        assert torch.equal(found, at_once[name]), name


def test_only_coarse_maps_are_standardised_as_a_whole():
    pyramid = resembling(torch.zeros(1, 16, 16, 16))
    table = taught(resembling, QUICK)
    held = [isinstance(level, FeatureMap) for level in table.standardise(pyramid)]
    assert held == [stride >= 4 for _, stride in MAPS]


def test_voxels_that_teach_are_drawn_from_those_of_their_class():
    """The draw of `argwhere`, which holds three numbers per voxel."""
    labels = np.random.default_rng(0).choice(3, size=(7, 9, 8), p=(0.8, 0.15, 0.05)).astype(np.int16)
    points, _ = draw_voxels(labels, 40, None, np.random.default_rng(1))
    rng = np.random.default_rng(1)
    every = [np.argwhere(labels == value) for value in range(3)]
    expected = [at[rng.permutation(len(at))[:wanted]] for at, wanted in zip(every, (20, 10, 10), strict=True)]
    assert np.array_equal(points, np.concatenate(expected))


MEASURE = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
import test_probing_memory as test
from nnssl_ext.probing import run

def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

torch.set_num_threads(1)
run.CHUNK, run.QUERY_CHUNK = 2048, 1024
maps = sys.argv[1] == "maps"
describe = test.resembling if maps else test.describer(None, test.QUICK)
with torch.no_grad():
    table = test.taught(describe, test.QUICK)
    answers = run.teach(table, test.QUICK, 0)
    pyramid = test.constant(80) if maps else describe(torch.randn(1, 80, 80, 80))
    before = peak()
    pyramid = table.standardise(pyramid)
    for answer in answers.values():
        answer(pyramid, (80, 80, 80))
print((peak() - before) / 80**3)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the process' peak memory from Linux")
@pytest.mark.parametrize("features", ["maps", "intensities"])
def test_a_volume_takes_a_few_bytes_per_voxel(features):
    """Holding every voxel's 27 intensities or 64 channels takes over 500 (measured)."""
    done = subprocess.run([sys.executable, "-c", MEASURE, features], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 60
