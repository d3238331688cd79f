"""Short real runs: settings that are broken on purpose are named by the diagnosis, healthy seeds raise no alarm."""

import csv

import numpy as np
import pytest
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from PIL import Image
from scipy.ndimage import gaussian_filter
from tiny_dataset import CONFIGURATION, DATASET, write_dataset

from nnssl_ext.cli import train
from nnssl_ext.engine import log, loop
from nnssl_ext.engine.job import Job
from nnssl_ext.networks.teacher import EMATeacher

DINO = (
    # few prototypes and a fast teacher suit runs of 60 steps
    *("-tr", "DINO3DTrainer", "--head.prototypes", "64", "--teacher.momentum", "0.9", "1.0"),
    *("--teacher.temperature", "0.04", "0.04", "--iterations", "20"),
)
IBOT = ("-tr", "IBOTTrainer", *DINO[2:])
SIMSIAM = ("-tr", "SimSiamTrainer", "--iterations", "20")
MAE = ("-tr", "MAETrainer", "--iterations", "20")


@pytest.fixture
def textures(nnunet_env):
    """Twelve cases that can be told apart: noise, smoothed differently along each axis."""
    data = write_dataset(nnunet_env.preprocessed, cases=1) / "tiny_3d_fullres"
    rng = np.random.default_rng(0)
    for number in range(1, 12):
        sigma = (0, *rng.choice((0.4, 1.2, 3.0), 3).tolist())
        image = gaussian_filter(rng.normal(size=(1, 20, 20, 20)), sigma).astype(np.float32)
        image = (image - image.mean()) / image.std()
        properties = {"spacing": [1.0, 1.0, 1.0], "class_locations": {}}
        nnUNetDatasetBlosc2.save_case(
            image, (image > 0.5).astype(np.int8), properties, str(data / f"case_{number:02d}")
        )


@pytest.fixture
def quick(textures, monkeypatch):
    """Without curves, which take most of the time of epochs this short."""
    monkeypatch.setattr(log, "draw_progress", lambda *_: None)
    monkeypatch.setattr(loop, "write_run_report", lambda *_: None)
    monkeypatch.setattr(loop, "draw_pictures", lambda *_: None)


def run(*flags: str, backbone: str = "PrimusTiny", seed: int = 0) -> tuple[Job, str]:
    """Carry out a run; the job and what was diagnosed at its end."""
    fixed = ("-p", f"nnssl{backbone}Plans", "-device", "cpu", "--picture_epochs", "1000")
    args, rest = train.parser().parse_known_args(
        [DATASET, CONFIGURATION, *fixed, "--probe_epochs", "0", "--seed", str(seed), *flags]
    )
    job = train._job(args, rest)
    assert loop.pretrain(job)
    return job, (job.output / "diagnosis.txt").read_text()


def test_a_missing_centring_is_named(quick):
    _, told = run(*DINO, "--epochs", "7", "--teacher.centring", "none", "--teacher.patch_centring", "none")
    assert "answers the same to every crop" in told and "check that centring is on" in told


def test_a_missing_momentum_is_named(quick):
    _, told = run(*DINO, "--epochs", "1", "--teacher.momentum", "0", "0")
    assert told.startswith("alarm since step 20: the teacher's momentum is 0")


def test_a_teacher_that_shares_the_student_s_weights_is_named(quick, monkeypatch):
    separate = EMATeacher.__init__

    def sharing(self, student):
        separate(self, student)
        self.parts = student

    monkeypatch.setattr(EMATeacher, "__init__", sharing)
    _, told = run(*DINO, "--epochs", "1")
    assert told.startswith("alarm since step 20: the teacher's weights equal the student's exactly")


def test_a_missing_predictor_is_named(quick):
    _, told = run(*SIMSIAM, "--epochs", "1", "--no-predictor")
    assert told.startswith("alarm since step 20: predictions equal projections: there is no predictor")


def test_disjoint_pairs_are_named(quick):
    _, told = run(*SIMSIAM, "--epochs", "1", "--iou", "0", "0")
    assert "mean IoU of 0.000" in told and "--iou 0.3 0.6" in told


@pytest.mark.parametrize(
    ("flags", "lr"), [(SIMSIAM, "0.1"), (DINO, "0.2"), (MAE, "0.2")], ids=["SimSiam", "DINO", "MAE"]
)
def test_a_hundredfold_learning_rate_is_named(quick, flags, lr):
    _, told = run(*flags, "--epochs", "2", "--optim.lr", lr)
    assert "the weights grew" in told and "divide --optim.lr by 10" in told


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("flags", [SIMSIAM, DINO, IBOT, MAE], ids=["SimSiam", "DINO", "iBOT", "MAE"])
def test_healthy_seeds_raise_no_alarm(quick, flags, seed):
    _, told = run(*flags, "--epochs", "3", seed=seed)
    assert told == f"{log.HEALTHY}\n"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_healthy_convolutional_seeds_raise_no_alarm(quick, seed):
    _, told = run(*SIMSIAM, "--epochs", "3", backbone="ResEncTiny", seed=seed)
    assert told == f"{log.HEALTHY}\n"


def test_findings_and_the_probe_reach_log_curves_and_report(textures, capsys):
    flags = (*SIMSIAM, "--epochs", "3", "--no-predictor", "--probe_epochs", "2")
    job, _ = run(*flags)
    printed = capsys.readouterr().out
    assert printed.count("alarm since step 20: predictions equal projections") == 1  # news are told once
    page = (job.output / "report.html").read_text()
    assert "predictions equal projections" in page and "Table 1" not in page
    assert page.count("data:image/png;base64,") == 3  # curves, first and last picture
    with open(job.output / "training_log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [bool(row["probe_dice"]) for row in rows] == [True, False, True]
    assert rows[0]["probe_dice_random"] == rows[2]["probe_dice_random"]
    assert 0 < float(rows[2]["knn_dice"]) <= 1
    red = np.asarray(Image.open(job.output / "progress.png").convert("RGB")).astype(int)
    alarm = np.abs(red - (0xB0, 0x00, 0x20)).sum(axis=-1) < 30
    assert alarm[: red.shape[0] // 8].sum() > 100 and alarm[red.shape[0] // 8 :].sum() == 0
