"""The package on a GPU, as far as a machine without one can tell: on the device of `pretend_gpu`, every method, registration,
probe and fine-tuning run, mix no devices, give what the CPU gives, and wait for the device where they must only."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from scipy.ndimage import gaussian_filter
from tiny_dataset import BACKBONES, job_of, log_of, write_for_fine_tuning
from torch.utils import backend_registration

from nnssl_ext.catalogue import pretraining_methods
from nnssl_ext.engine import loop

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch cannot be given a device written in Python",
)
TESTS = Path(__file__).resolve().parent
CHECK = "if not torch.isfinite(norm):"
"""The one wait of a step: whether its gradient may be followed."""
REFUSALS = """
import numpy as np, torch
from pretend_gpu import pretend_gpu
with pretend_gpu() as device:
    here, there = torch.ones(2, 3, device=device), torch.ones(2, 3)
    for wrong in (
        lambda: here + there,
        lambda: there.add_(here),
        lambda: here[0].index_copy_(0, torch.tensor([1]), there[0, :1]),
        lambda: torch.cat([here, there]),
        lambda: torch.nn.functional.linear(here, there),
        lambda: torch._foreach_add_([here], [there]),
        lambda: torch.randn(3, generator=torch.Generator(), device=device),
        lambda: here.uniform_(generator=torch.Generator()),
        lambda: there.uniform_(generator=torch.Generator(device)),
        lambda: here.numpy(),
        lambda: np.asarray(here),
    ):
        try:
            wrong()
        except (RuntimeError, TypeError):
            continue
        raise SystemExit(f"allowed: line {wrong.__code__.co_firstlineno}")
    right = (here * 2 + torch.tensor(1.0)).to("cpu") + there, here[torch.tensor([1])], torch.rand(3, device=device)
"""


@pytest.fixture
def dataset(nnunet_env):
    return write_for_fine_tuning(nnunet_env.preprocessed, train=4, val=2)


def python(*arguments: object, folder: Path) -> str:
    command = [sys.executable, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "nnUNet_n_proc_DA": "0"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def on_pretend_gpu(*scenes: tuple[object, ...], folder: Path) -> list[dict]:
    asked = json.dumps([[str(word) for word in scene] for scene in scenes])
    return json.loads(python(TESTS / "on_pretend_gpu.py", asked, folder=folder).splitlines()[-1])


def test_the_pretended_gpu_refuses_what_cuda_refuses(tmp_path):
    python("-c", REFUSALS, folder=tmp_path)


def assert_as_on_the_cpu(*figures: str, method: str, backbone: str, tolerance: float = 1e-3) -> None:
    cpu, gpu = (log_of(job_of("--name", place, method=method, backbone=backbone)) for place in ("cpu", "pretend"))
    assert [float(row["step"]) for row in gpu] == [2, 4]
    for figure in figures:
        expected, found = ([float(row[figure]) for row in rows] for rows in (cpu, gpu))
        np.testing.assert_allclose(found, expected, rtol=tolerance, err_msg=f"{method}, {figure}")


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_method_trains_and_resumes_as_on_the_cpu(dataset, tmp_path, backbone):
    methods = pretraining_methods()
    small = {"RegistrationTrainer": ("--places", "64", "--layer.search", "2")}
    scenes = [("train", backbone, method, "--probe_epochs", "0", *small.get(method, ())) for method in methods]
    for method, waits in zip(methods, on_pretend_gpu(*scenes, folder=tmp_path), strict=True):
        assert_as_on_the_cpu("loss", "grad_norm", method=method, backbone=backbone)
        lines = {place.split(": ", 1)[1]: count for place, count in waits.items()}
        assert lines.pop(CHECK) == 1, method
        if method != "RegistrationTrainer":  # its solver looks at the features it is given
            assert not lines, method


def test_a_run_is_probed_and_registered_with_as_on_the_cpu(dataset, tmp_path):
    flags = ("--probe_epochs", "1", "--registration_pairs", "1")
    on_pretend_gpu(("train", "ResEncTiny", "MAETrainer", *flags), folder=tmp_path)
    asked = ("probe_dice", "knn_dice", "registration_dice", "registration_sdlogj")
    assert_as_on_the_cpu(*asked, method="MAETrainer", backbone="ResEncTiny", tolerance=0.02)


@pytest.fixture
def scans(tmp_path):
    """Smooth noise, and the same shifted, with labels."""
    fixed = gaussian_filter(np.random.default_rng(0).normal(size=(24, 22, 26)), 2).astype(np.float32)
    moving = np.roll(fixed, (1, -1, 2), (0, 1, 2))
    for name, voxels in {"fixed": fixed, "moving": moving, "labels": (moving > 0.1).astype(np.uint8)}.items():
        sitk.WriteImage(sitk.GetImageFromArray(voxels), tmp_path / f"{name}.nii.gz")
    return tmp_path


@pytest.mark.parametrize("backbone", BACKBONES)
def test_registration_finds_what_it_finds_on_the_cpu(dataset, scans, backbone):
    network = f"random:{dataset / f'nnssl{backbone}Plans.json'}"
    tiles = ("--features.tile", "16", "16", "16")
    commands = [
        (f"{network}@decoder0+mind+intensity", "--init", "affine"),
        (network, *tiles, "--features.shifts", "2"),
        (network, *tiles, "--solver.diffeomorphic", "--solver.sdlogj", "0.1"),
    ]
    for apart in on_pretend_gpu(*(("registration", *command) for command in commands), folder=scans):
        assert apart.keys() == {"displacement", "displacement_inverse", "warped", "warped_labels"}
        assert max(apart.values()) < 1e-3


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_checkpoint_is_probed_and_fine_tuned(dataset, tmp_path, backbone):
    job = job_of("--epochs", "1", "--iterations", "1", "--probe_epochs", "0", backbone=backbone)
    assert loop.pretrain(job)
    weights = job.output / "checkpoint_final.pth"
    scenes = [("probing", weights), ("finetuning", f"nnssl{backbone}Plans", weights)]
    probed, tuned = on_pretend_gpu(*scenes, folder=tmp_path)
    assert probed["rows"] == 9  # three features, three heads
    assert probed["apart"] < 0.01  # a few of a thousand voxels, where two classes are as likely
    assert tuned == {"epochs": 2, "device": "pretend:0"}
