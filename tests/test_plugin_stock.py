"""Stock nnU-Net keeps working whatever becomes of the plugin: installed, disabled, broken in three ways, uninstalled."""

import json
import math
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import numpy as np
import pytest
import SimpleITK

pytestmark = pytest.mark.slow

OURS = ("nnsslFinetuneTrainer", "nnunetv2.training.nnUNetTrainer")
OURS_MODULE = "nnssl_ext.trainers.finetuning.nnssl_finetune_trainer"
BREAK = "\nraise RuntimeError('broken on purpose')\n"


class Environment:
    """A small virtual environment that borrows torch and nnU-Net from this one, but not its start-up files.

    Python processes no ``.pth`` file of a folder that a ``.pth`` file adds, so nothing of an nnssl_ext installed here is
    active there.
    """

    def __init__(self, folder: Path) -> None:
        venv.create(folder, symlinks=os.name != "nt")
        scripts = "Scripts" if os.name == "nt" else "bin"
        self.python = folder / scripts / "python"
        self.packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
        borrowed = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
        (self.packages / "borrowed.pth").write_text("\n".join(borrowed))

    def pip(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "pip", "--python", str(self.python), "--quiet", *arguments]
        subprocess.run(command, check=True, capture_output=True, timeout=120)

    def run(self, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        env = {name: value for name, value in os.environ.items() if name != "NNSSL_EXT_DISABLE"}
        return subprocess.run(
            [str(self.python), *map(str, arguments)],
            env={**env, **environment},
            cwd=self.packages.parent,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )


@pytest.fixture
def environment(tmp_path, built) -> Environment:
    """With our wheel installed."""
    fresh = Environment(tmp_path / "venv")
    fresh.pip("install", "--no-deps", "--no-index", str(built.wheel))
    return fresh


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """nnU-Net's variables; the folders hold four tiny labelled cases, preprocessed by the stock command."""
    base = tmp_path_factory.mktemp("stock")
    variables = {name: str(base / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    raw = base / "nnUNet_raw" / "Dataset001_Boxes"
    rng = np.random.default_rng(0)
    for index in range(4):
        label = np.zeros((20, 24, 22), np.uint8)
        label[5:14, 6:16, 4:15] = 1
        image = rng.normal(label, 0.3).astype(np.float32)
        for folder, name, voxels in (("imagesTr", f"box{index}_0000", image), ("labelsTr", f"box{index}", label)):
            (raw / folder).mkdir(parents=True, exist_ok=True)
            SimpleITK.WriteImage(SimpleITK.GetImageFromArray(voxels), raw / folder / f"{name}.nii.gz")
    labels = {"background": 0, "box": 1}
    description = {"channel_names": {"0": "MRI"}, "labels": labels, "numTraining": 4, "file_ending": ".nii.gz"}
    (raw / "dataset.json").write_text(json.dumps(description))
    script = Path(sysconfig.get_path("scripts")) / "nnUNetv2_plan_and_preprocess"
    options = {"-d": "1", "-c": "3d_fullres", "-np": "1", "-npfp": "1", "-pl": "ResEncUNetPlanner"}
    command = [sys.executable, str(script), *(word for pair in options.items() for word in pair)]
    subprocess.run(command, env={**os.environ, **variables}, check=True, capture_output=True, timeout=300)
    splits = [{"train": ["box0", "box1", "box2"], "val": ["box3"]}]
    (base / "nnUNet_preprocessed" / "Dataset001_Boxes" / "splits_final.json").write_text(json.dumps(splits))
    return variables


def stock(environment: Environment, folders: dict[str, str], **variables: str) -> tuple[dict, str]:
    """What stock nnU-Net did in `environment`, and its stderr."""
    script = Path(__file__).parent / "stock_nnunet.py"
    done = environment.run(script, 1, *OURS, **folders, **variables)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["plans"] == "nnUNetResEncUNetPlans"
    assert math.isfinite(found["loss"])
    return found, done.stderr


def break_module(environment: Environment, name: str) -> None:
    source = environment.packages.joinpath(*name.split(".")).with_suffix(".py")
    source.write_text(source.read_text() + BREAK)


def test_installed_finds_ours_too_in_spawned_workers_as_well(environment, folders):
    found, _ = stock(environment, folders)
    assert found["ours"] == found["spawned"] == OURS_MODULE


def test_disabled(environment, folders):
    found, said = stock(environment, folders, NNSSL_EXT_DISABLE="1")
    assert found["ours"] is found["spawned"] is None
    assert "nnssl_ext" not in said


def test_registered_module_raising(environment, folders):
    break_module(environment, OURS_MODULE)
    found, _ = stock(environment, folders)
    assert found["ours"] == found["spawned"] == "RuntimeError: broken on purpose"


def test_registry_raising(environment, folders):
    break_module(environment, "nnssl_ext.nnunet_plugin.registry")
    found, said = stock(environment, folders)
    assert found["ours"] is found["spawned"] is None
    lines = [line for line in said.splitlines() if "nnssl_ext" in line]
    assert len(lines) == 2  # one per process
    assert "broken on purpose" in lines[0]


def test_startup_raising(environment, folders):
    break_module(environment, "nnssl_ext.nnunet_plugin.startup")
    found, said = stock(environment, folders)
    assert found["ours"] is found["spawned"] is None
    assert "nnssl_ext.pth" in said


def test_uninstalled_leaves_nothing(environment, folders):
    environment.pip("uninstall", "--yes", "nnssl-ext")
    found, said = stock(environment, folders)
    assert found["ours"] is found["spawned"] is None
    assert "nnssl" not in said
    assert not list(environment.packages.glob("nnssl*"))


def test_editable_installation_finds_ours(tmp_path):
    fresh = Environment(tmp_path / "venv")
    checkout = Path(__file__).resolve().parent.parent
    fresh.pip("install", "--no-deps", "--no-index", "--no-build-isolation", "--editable", str(checkout))
    code = "import sys, stock_nnunet; print(stock_nnunet.lookup(*sys.argv[1:]))"
    done = fresh.run("-c", code, *OURS, PYTHONPATH=str(Path(__file__).parent))
    assert done.stdout.strip() == OURS_MODULE, done.stderr


def test_run_replaces_a_startup_file_that_python_ignores(environment):
    (environment.packages / "nnssl_ext.pth").unlink()
    arguments = ("nnUNetv2_train", "1", "3d_fullres", "0", "-tr", "nnsslFinetuneTrainr", "-device", "cpu")
    done = environment.run("-m", "nnssl_ext.nnunet_plugin.run", *arguments)
    assert "did you mean 'nnsslFinetuneTrainer'?" in done.stderr
