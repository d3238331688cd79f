"""Set-up that all tests share: one thread per process, shapes enforced, real data and isolated folders."""

import os

# Before anything imports torch. nnU-Net reads its own two at import.
SINGLE_THREADED = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "nnUNet_n_proc_DA": "1",  # 0 crashes nnU-Net's planning
    "nnUNet_def_n_proc": "1",
    "nnUNet_compile": "f",
}
os.environ.update(SINGLE_THREADED)
os.environ["MPLBACKEND"] = "Agg"

import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest
from jaxtyping import install_import_hook

install_import_hook("nnssl_ext", "beartype.beartype")
hypothesis.settings.register_profile("shared machine", deadline=None)  # how long an example takes proves nothing here
hypothesis.settings.load_profile("shared machine")

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "nnssl_results")


@dataclass(frozen=True)
class Workspace:
    """The four folders of one test, empty at first; the environment names them, in this process and its children."""

    raw: Path
    preprocessed: Path
    results: Path
    pretraining: Path

    def run(self, *command: object, timeout: float = 600, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command of this environment (``"nnUNetv2_train", 4, ...``) and capture its text.

        With `check`, a non-zero exit code fails the test and shows what the command printed.
        """
        name, *arguments = map(str, command)
        script = Path(sys.executable).parent / name
        finished = subprocess.run(
            [str(script if script.exists() else name), *arguments],
            check=False,
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd=self.raw.parent,
        )
        if check and finished.returncode != 0:
            pytest.fail(
                f"{name} ended with {finished.returncode}\n{finished.stdout[-4000:]}\n{finished.stderr[-4000:]}"
            )
        return finished


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real example scans: ``NNSSL_TEST_DATA``, else ``shared/data`` beside the checkout."""
    path = Path(os.environ.get("NNSSL_TEST_DATA") or ROOT.parent / "shared" / "data")
    if not path.is_dir():
        pytest.skip(f"no real scans at {path}; set NNSSL_TEST_DATA to a folder that holds Task04_Hippocampus")
    return path


@pytest.fixture
def nnunet_env(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workspace]:
    """Isolated nnU-Net folders, for this process and its children: nnU-Net reads the variables when it uses a folder."""
    for variable in FOLDERS:
        (tmp_path / variable).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / variable))
    for variable, value in SINGLE_THREADED.items():
        monkeypatch.setenv(variable, value)
    yield Workspace(*(tmp_path / variable for variable in FOLDERS))


@dataclass(frozen=True)
class Distribution:
    """What the build backend makes of the checkout."""

    sdist: Path
    wheel: Path
    wheel_from_sdist: Path


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Distribution:
    """The checkout, copied so that the build leaves no trace in it, as sdist, wheel, and wheel out of the sdist."""
    source = tmp_path_factory.mktemp("checkout") / "copy"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "tests")
    shutil.copytree(ROOT, source, symlinks=True, ignore=ignored)
    direct, through = tmp_path_factory.mktemp("direct"), tmp_path_factory.mktemp("through")
    for options in (["--wheel", "--outdir", direct], ["--outdir", through]):  # the second: sdist, then wheel from it
        command = [sys.executable, "-m", "build", "--no-isolation", *map(str, options), str(source)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    (wheel,), (sdist,), (rebuilt,) = direct.glob("*.whl"), through.glob("*.tar.gz"), through.glob("*.whl")
    return Distribution(sdist, wheel, rebuilt)
