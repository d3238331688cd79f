"""The demo: what it holds out, what it says about Dice, and the whole of it with a tiny budget."""

import base64
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nnssl_ext.demo.commands import learning, planning
from nnssl_ext.demo.data import hold_out
from nnssl_ext.demo.main_job import claim
from nnssl_ext.demo.page import _dice_table, read_dice
from nnssl_ext.demo.settings import DemoSettings
from nnssl_ext.errors import NnsslError


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).parent / "nnssl_demo", *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=900)


def raw_dataset(folder: Path, cases: int, channels: int = 2) -> Path:
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    for case in range(cases):
        (folder / "labelsTr" / f"c{case}.nii.gz").write_text(f"label {case}")
        for channel in range(channels):
            (folder / "imagesTr" / f"c{case}_{channel:04d}.nii.gz").write_text(f"image {case} {channel}")
    (folder / "dataset.json").write_text(json.dumps({"numTraining": cases, "file_ending": ".nii.gz", "labels": {}}))
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


class TestHoldOut:
    def test_cases_move_whole_and_the_description_follows(self, tmp_path):
        dataset = raw_dataset(tmp_path / "Dataset900_X", 12)
        chosen = hold_out(dataset, 4)
        files = contents(dataset)
        assert len(chosen) == 4 and json.loads(files["dataset.json"])["numTraining"] == 8
        for case in range(12):
            part = "Ts" if f"c{case}" in chosen else "Tr"
            assert files[f"labels{part}/c{case}.nii.gz"] == f"label {case}"
            for channel in range(2):
                assert files[f"images{part}/c{case}_{channel:04d}.nii.gz"] == f"image {case} {channel}"
        assert len(files) == 12 * 3 + 1

    def test_again_changes_nothing_and_an_interruption_is_made_good(self, tmp_path):
        dataset = raw_dataset(tmp_path / "Dataset900_X", 12)
        chosen = hold_out(dataset, 4)
        done = contents(dataset)
        assert hold_out(dataset, 4) == chosen and contents(dataset) == done
        (dataset / "imagesTs" / f"{chosen[0]}_0001.nii.gz").rename(dataset / "imagesTr" / f"{chosen[0]}_0001.nii.gz")
        (dataset / "labelsTs" / f"{chosen[0]}.nii.gz").rename(dataset / "labelsTr" / f"{chosen[0]}.nii.gz")
        assert hold_out(dataset, 4) == chosen and contents(dataset) == done

    def test_names_that_begin_alike_stay_apart(self, tmp_path):
        dataset = raw_dataset(tmp_path / "Dataset900_X", 12)  # c1, c10, c11
        chosen = set(hold_out(dataset, 6))
        images = {p.name.rsplit("_", 1)[0] for p in (dataset / "imagesTs").iterdir()}
        assert images == chosen and chosen & {"c1", "c10", "c11"}

    def test_too_few_cases(self, tmp_path):
        with pytest.raises(NnsslError, match="12 cases"):
            hold_out(raw_dataset(tmp_path / "Dataset900_X", 12), 8)


class TestDice:
    def test_summary_of_nnunet(self, tmp_path):
        cases = [
            {"metrics": {"1": {"Dice": 0.5}, "2": {"Dice": float("nan")}}},
            {"metrics": {"1": {"Dice": 1.0}, "2": {"Dice": 0}}},
        ]
        (tmp_path / "summary.json").write_text(json.dumps({"metric_per_case": cases}))
        dice = read_dice(tmp_path / "summary.json")
        assert np.array_equal(dice[1], [0.5, 1.0]) and np.array_equal(dice[2], [np.nan, 0.0], equal_nan=True)

    def test_table_by_hand(self):
        dice = {
            ("primus", "pretrained"): {1: np.array([0.8, 0.9, 0.7]), 2: np.array([0.5, np.nan, 0.7])},
            ("primus", "scratch"): {1: np.array([0.6, 0.8, 0.7]), 2: np.array([0.4, np.nan, 0.4])},
        }
        table = _dice_table("primus", {"background": 0, "organ": 1, "vessel": 2}, dice)
        rows = {row[0]: row[1:] for row in table.rows}
        # organ: differences .2, .1, 0: mean .1, standard deviation .1, over the root of 3
        assert rows["organ"] == pytest.approx((0.8, 0.7, 0.1, 0.1 / 3**0.5), abs=5e-4)
        # vessel: the second case has none; differences .1, .3
        assert rows["vessel"] == pytest.approx((0.6, 0.4, 0.2, 0.1), abs=5e-4)
        # mean of the structures per case: .65 .9 .7 against .5 .8 .55: differences .15 .1 .15
        assert rows["mean"] == pytest.approx(
            (0.75, 1.85 / 3, 0.4 / 3, np.std([0.15, 0.1, 0.15], ddof=1) / 3**0.5), abs=5e-4
        )


def test_arms_differ_in_the_pretrained_weights_alone(tmp_path):
    steps = {step.name: step for step in learning(DemoSettings(tmp_path), "resenc", [1, 2])}
    pretrained, scratch = (list(steps[f"resenc: train {arm}"].command) for arm in ("pretrained", "scratch"))
    flag = pretrained.index("-pretrained_weights")
    assert pretrained[:flag] + pretrained[flag + 2 :] == scratch
    assert pretrained[0] == "nnUNetv2_train" and pretrained[flag + 1].endswith("checkpoint_final.pth")


def test_planning_begins_without_what_was_planned_for_other_cases(tmp_path):
    """Stock planning keeps a fingerprint and a split that it finds."""
    first, second = planning(DemoSettings(tmp_path, backbones=("primus", "resenc")))
    folder = first.products[0]
    assert folder.parent.name == "nnUNet_preprocessed" and folder == second.products[0].parent
    assert folder not in second.products


def test_the_output_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(NnsslError, match="something else"):
        claim(tmp_path)
    claim(tmp_path / "new")
    claim(tmp_path / "new")


def test_no_task_folder(tmp_path):
    finished = run("--data", tmp_path, "-o", tmp_path / "out")
    assert finished.returncode == 2
    assert "no dataset.json" in finished.stderr and "Task04_Hippocampus" in finished.stderr


@pytest.mark.slow
def test_the_main_job_from_phantoms_to_page(tmp_path):
    budget = ("--cases", "13", "--labelled", "2", "--pretrain-steps", "10", "--finetune-steps", "10")
    finished = run("-o", tmp_path / "out", "--backbone", "resenc", *budget)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    page = (tmp_path / "out" / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!#|data:)', page)
    pictures = [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', page)]
    assert len(pictures) == 6 and all(picture.startswith(b"\x89PNG") for picture in pictures)
    for name in ("organ", "vessel", "shell", "nodules", "bone", "mean"):
        cells = re.search(rf"<tr><td>{name}</td>(.*?)</tr>", page).group(1)
        assert len(re.findall(r">-?\d[\d.e-]*<|>nan<", cells)) == 4, cells
    for words in ("nnUNetv2_train 900", "-pretrained_weights", "export nnUNet_raw=", "nnssl_convert msd"):
        assert words in page

    again = run("-o", tmp_path / "out", "--backbone", "resenc", *budget)
    assert again.returncode == 0 and again.stdout.count("kept") == 10  # nothing is done twice
