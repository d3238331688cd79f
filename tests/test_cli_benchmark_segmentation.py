"""``nnssl_benchmark segmentation`` and ``report`` as users run them."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkpoint_helpers import content_of
from fake_cells import finish
from tiny_dataset import DATASET, plans_of, write_dataset

from nnssl_ext.benchmark.execution import Workers
from nnssl_ext.checkpoints.io import save_checkpoint
from nnssl_ext.cli import benchmark
from nnssl_ext.errors import NnsslError
from nnssl_ext.files import read_json, write_json

PLANS = "nnsslPrimusTinyPlans"


@pytest.fixture
def checkpoint(nnunet_env) -> Path:
    """A dataset of six cases, and a checkpoint of a run that saw one of the two test cases."""
    folder = write_dataset(nnunet_env.preprocessed, cases=6)
    write_json(folder / "dataset_fingerprint.json", {})
    cases = [f"case_{number:02d}" for number in range(6)]
    (folder / "gt_segmentations").mkdir()
    for case in cases[4:]:
        (folder / "gt_segmentations" / f"{case}.nii.gz").touch()
    write_json(folder / "splits_final.json", [{"train": cases[:4], "val": cases[4:]}])
    path = nnunet_env.pretraining / "run" / "checkpoint_final.pth"
    save_checkpoint(path, content_of(plans_of("PrimusTiny"), data_summary={"dataset": DATASET, "cases": 2}))
    write_json(path.parent / "settings.json", {"dataset": DATASET, "cases": ["case_00", "case_05"]})
    return path


@pytest.fixture
def instant(monkeypatch) -> list[str]:
    """Cells without training; returns the names of those that were run."""
    done: list[str] = []

    def run(workers, cell, slot):
        done.append(str(cell))
        finish(cell, workers.output)

    monkeypatch.setattr(Workers, "run", run)
    return done


def call(monkeypatch, *argv) -> int:
    monkeypatch.setattr(sys, "argv", ["nnssl_benchmark", *map(str, argv)])
    return benchmark._main()


def flags(checkpoint: Path, out: Path, *more) -> tuple:
    return (
        *("segmentation", "-d", 901, "-p", PLANS, "-m", f"MAE={checkpoint}", "-o", out, "--train_cases", 1, 2),
        *("--epochs", 2, "--seeds", 2, "-device", "cpu", "--iterations_per_epoch", 10, *more),
    )


def test_from_the_command_to_the_page(checkpoint, instant, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert call(monkeypatch, *flags(checkpoint, out)) == 0
    assert len(instant) == 8 and instant[:2] == [
        "scratch, 1 labelled, 2 epochs, seed 0",
        "MAE, 1 labelled, 2 epochs, seed 0",
    ]
    said = capsys.readouterr().out
    assert "2 test cases, fold 0 of its splits_final.json" in said and "8 of 8 cells are done" in said
    assert "MAE against scratch, 1 labelled, 20 iterations: " in said
    assert f"note: MAE: 1 of 2 test cases, by name, were in its pretraining on {DATASET}: case_05" in said
    before = read_json(out / "report.json")
    assert "case_05" in before["warnings"][0] and before["settings"][PLANS]["evaluations"] == 2
    (out / "report.json").unlink()
    assert call(monkeypatch, "report", out) == 0
    assert read_json(out / "report.json") == before
    assert call(monkeypatch, *flags(checkpoint, out, "--seeds", 3)) == 0  # more of the same: the rest is kept
    assert len(instant) == 12 and all(name.endswith("seed 2") for name in instant[8:])


def test_two_commands_at_a_time_leave_the_cells_of_both_in_the_report(checkpoint, tmp_path, monkeypatch):
    out, started = tmp_path / "out", []

    def run(workers, cell, slot):
        if not started:  # while the first command works on its first cell, the second comes and goes
            started.append(cell)
            assert call(monkeypatch, *flags(checkpoint, out, "--train_cases", 1)) == 0
        finish(cell, workers.output)

    monkeypatch.setattr(Workers, "run", run)
    assert call(monkeypatch, *flags(checkpoint, out, "--train_cases", 2)) == 0
    assert read_json(out / "report.json")["cells"] == {"done": 8, "all": 8}


def test_dry_run_lists_cells_and_hours(checkpoint, instant, tmp_path, monkeypatch, capsys):
    """Fake cells take 0.5 s per iteration and 10 s per evaluation, 20 s for the pilot's two: 10 + 2 x 10 s per cell."""
    out = tmp_path / "out"
    assert call(monkeypatch, *flags(checkpoint, out, "--dry-run", "--side_by_side", 2)) == 0
    said = capsys.readouterr().out
    assert instant == ["scratch, 1 labelled, 1 epochs, seed 0"]  # the pilot
    assert said.count("\nopen: ") == 8 and "open: MAE, 2 labelled, 2 epochs, seed 1, 0.5 min" in said
    assert "8 of 8 cells are open: about 0.03 h, 2 at a time" in said
    assert not list(out.glob("cells/**/result.json"))
    assert call(monkeypatch, *flags(checkpoint, out)) == 0  # the same folder goes on


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--train_cases", 9], "train_cases is 9, but the fold has 4"),
        (["--train_cases", 0], "--train_cases 0"),
        (["--seeds", 0], "--seeds 0"),
        (["--against", "DINO"], "--against DINO"),
        (["--seed", 3], "--seed is what the matrix varies"),
        (["-f", 3], "fold 3"),
        (["--layer_decay", 2], "layer_decay"),
        (["--slurm", "gpu"], "--slurm gpu"),
        (["--side_by_side", 0], "--side_by_side 0"),
        (["-p", "nnsslPrimusTinyPlan"], "unknown plans"),
    ],
)
def test_bad_requests_are_named_before_any_work(checkpoint, instant, tmp_path, monkeypatch, more, words):
    with pytest.raises(NnsslError, match=words):
        call(monkeypatch, *flags(checkpoint, tmp_path / "out", *more))
    assert instant == []


@pytest.mark.parametrize("file", ["splits_final.json", "dataset.json"])
def test_data_that_cannot_be_benchmarked_are_named_before_any_work(
    checkpoint, instant, tmp_path, monkeypatch, nnunet_env, file
):
    """Fewer cases than nnU-Net's default split has folds; no labels but a foreground mask."""
    folder = nnunet_env.preprocessed / DATASET
    if file == "splits_final.json":
        (folder / file).unlink()
        for case in (4, 5):
            (folder / "tiny_3d_fullres" / f"case_{case:02d}.b2nd").unlink()
        words = "has 4 case.*default split has five folds"
    else:
        write_json(folder / file, {**read_json(folder / file), "labels": {"background": 0, "foreground": 1}})
        words = "no labels to learn to tell"
    with pytest.raises(NnsslError, match=words):
        call(monkeypatch, *flags(checkpoint, tmp_path / "out"))
    assert instant == []


def test_report_of_nothing_is_refused(tmp_path, monkeypatch):
    with pytest.raises(NnsslError, match="holds no benchmark"):
        call(monkeypatch, "report", tmp_path)


@pytest.mark.slow
def test_real_cells_killed_and_resumed(nnunet_env, test_data, tmp_path):
    """Hippocampus: a matrix of stock trainings is killed five times; what comes out is what an undisturbed one says."""
    nnunet_env.run("nnssl_convert", "msd", test_data / "Task04_Hippocampus", "-d", 4, "--limit", 15, "-np", 1)
    nnunet_env.run(
        *(
            "nnUNetv2_plan_and_preprocess",
            "-d",
            4,
            "-pl",
            "nnsslPlannerResEncTiny",
            "-c",
            "3d_fullres",
            "-npfp",
            1,
            "-np",
            1,
        )
    )
    (dataset,) = nnunet_env.preprocessed.glob("Dataset004_*")
    weights = tmp_path / "run" / "checkpoint_final.pth"
    save_checkpoint(weights, content_of(read_json(dataset / "nnsslResEncTinyPlans.json")))
    request = [
        *("nnssl_benchmark", "segmentation", "-d", 4, "-p", "nnsslResEncTinyPlans", "-m", f"noise={weights}"),
        *(
            "--train_cases",
            2,
            "--epochs",
            2,
            "--seeds",
            1,
            "--iterations_per_epoch",
            2,
            "--val_iterations_per_epoch",
            1,
        ),
        *("--evaluations", 1, "-device", "cpu"),
    ]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    started = time.monotonic()
    nnunet_env.run(*request, "-o", whole)
    took = time.monotonic() - started
    script, moments = Path(sys.executable).parent / "nnssl_benchmark", random.Random(0)
    for turn in range(1, 6):
        process = subprocess.Popen(
            [str(script), *map(str, request[1:]), "-o", str(killed)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        if turn < 5:  # within the first cell
            time.sleep(moments.uniform(0.05, 0.4) * took)
        else:  # within the second
            while process.poll() is None and not any(killed.glob("cells/**/result.json")):
                time.sleep(0.2)
            time.sleep(moments.uniform(0, 0.1) * took)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    nnunet_env.run(*request, "-o", killed)
    one, other = (read_json(folder / "report.json") for folder in (whole, killed))
    for report in (one, other):
        assert report["cells"] == {"all": 2, "done": 2} and report["failures"] == {}
        told = [each for each in report["warnings"] if not each.startswith("the machine was busy")]
        assert told == ["noise: which cases it was pretrained on is unknown; test cases may be among them"]
        assert [len(row["curve"]) for row in report["rows"]] == [2, 2]
    assert [row["cases"] for row in one["rows"]] == [row["cases"] for row in other["rows"]]
    assert [c["verdict"] for c in one["comparisons"]] == [c["verdict"] for c in other["comparisons"]]
    page = (killed / "report.html").read_text()
    assert page.count("data:image/png") == 3 + 2 and "No picture" not in page  # three of curves, best and worst case
    assert os.listdir(dataset).count("splits_final.json") == 0
