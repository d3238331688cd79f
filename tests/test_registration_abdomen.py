"""An abdominal CT registered, at full resolution and by the command, to an MR-like copy of itself with a known warp between.

`pytest -s tests/test_registration_abdomen.py` prints the figures for MIND in docs/registration.md.
"""

from __future__ import annotations

import numpy as np
import pytest
from abdomen import write_abdomen
from checkpoint_helpers import content_of, plans_of, resenc

from nnssl_ext.checkpoints.io import save_checkpoint
from nnssl_ext.files import read_json


@pytest.fixture(scope="module")
def abdomen(test_data, tmp_path_factory):
    return write_abdomen(test_data, tmp_path_factory.mktemp("abdomen"))


@pytest.fixture
def register(abdomen, nnunet_env, tmp_path):
    """Runs the command with some features; returns the error in mm at every voxel of the body, and the measures."""

    def run(features, *flags):
        out = tmp_path / "out"
        pair = ("-f", abdomen.fixed, "-m", abdomen.moving, "-o", out, "-device", "cpu")
        nnunet_env.run("nnssl_register", *pair, "-c", features, *flags)
        error, measures = abdomen.error(out / "displacement.nii.gz"), read_json(out / "measures.json")
        seconds, memory = measures["seconds"], max(measures["peak_memory_gib"].values())
        print(
            f"\n{features} {' '.join(map(str, flags))}: TRE mean {error.mean():.2f}, median {np.median(error):.2f}, "
            f"95th percentile {np.percentile(error, 95):.2f} mm; {measures['smoothness_foreground']}; "
            f"{seconds['features']:.1f} s features, {seconds['solver']:.1f} s solver, {memory:.2f} GiB"
        )
        return error, measures

    return run


def test_mind_finds_the_warp_to_less_than_a_voxel(abdomen, register):
    """Voxels of 3 mm; the warp moves them by 7 mm on average, and the contrasts have no monotone relation."""
    before = np.linalg.norm(abdomen.truth, axis=-1)[abdomen.body]
    print(f"\nbefore: mean {before.mean():.2f}, 95th percentile {np.percentile(before, 95):.2f} mm")
    error, measures = register("mind")
    assert before.mean() > 6.5
    assert error.mean() < 2.75 and np.percentile(error, 95) < 6.5
    assert measures["smoothness_foreground"]["fold_percent"] < 0.01


@pytest.mark.slow
def test_a_random_network_in_tiles_says_what_it_says_of_the_whole(abdomen, register, tmp_path):
    """Fused with MIND. Blocks of nnU-Net's fresh networks add nothing, so all weights are drawn: a checkpoint holds them."""
    plans = plans_of(resenc(3), [64, 64, 64])
    plans["configurations"]["3d_fullres"]["spacing"] = [3.0] * 3
    path = tmp_path / "random.pth"
    save_checkpoint(path, content_of(plans))
    whole, _ = register(f"{path}+mind")
    tiled, _ = register(f"{path}+mind", "--features.tile", 96, 88, 96)
    apart = np.abs(whole - tiled)
    print(f"whole against tiles: mean {apart.mean():.3f}, largest {apart.max():.3f} mm")
    assert apart.mean() < 0.05
