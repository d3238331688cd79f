"""One cell of ``nnssl_benchmark segmentation``: what the training gets to see, and what is believed of it."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoint_helpers import content_of, nnssl_checkpoint
from tiny_dataset import CONFIGURATION, CROP, DATASET, plans_of, write_dataset

from nnssl_ext.benchmark import cell as cell_module
from nnssl_ext.benchmark.cell import dice_of, work_on
from nnssl_ext.benchmark.execution import write_job
from nnssl_ext.benchmark.matrix import Benchmark, parse_arms
from nnssl_ext.benchmark.preparation import check_arms, find_split, keep_checkpoints
from nnssl_ext.checkpoints.io import load_checkpoint, save_checkpoint
from nnssl_ext.checkpoints.safetensors_file import write_safetensors
from nnssl_ext.errors import NnsslError
from nnssl_ext.files import read_json, write_json
from nnssl_ext.networks.build import build_network
from nnssl_ext.trainers.finetuning.settings import FinetuneSettings

PLANS = "nnsslPrimusTinyPlans"


@pytest.fixture
def benchmark(nnunet_env):
    folder = write_dataset(nnunet_env.preprocessed, cases=6)
    write_json(folder / "dataset_fingerprint.json", {})
    (folder / "gt_segmentations").mkdir()
    for number in range(6):
        (folder / "gt_segmentations" / f"case_{number:02d}.nii.gz").touch()
    run = nnunet_env.pretraining / "run"
    save_checkpoint(run / "checkpoint_final.pth", content_of(plans_of("PrimusTiny")))
    return Benchmark(
        dataset=DATASET,
        preprocessed=folder,
        configuration=CONFIGURATION,
        split=find_split(DATASET, PLANS, CONFIGURATION, 0),
        arms=tuple(parse_arms([f"MAE={run / 'checkpoint_final.pth'}"], PLANS)),
        train_cases=(2,),
        epochs=(4,),
        seeds=1,
        settings={PLANS: FinetuneSettings(iterations_per_epoch=5, evaluations=1)},
    )


class Training:
    """Stands in for ``nnUNetv2_train``: notes what it was given and leaves what nnU-Net leaves."""

    def __init__(self, monkeypatch) -> None:
        self.seen: dict = {}
        self.changes: dict = {}
        self.fails = False
        monkeypatch.setattr(cell_module, "_run", self.run)

    def run(self, command: list[str], variables: dict[str, str], log: Path) -> None:
        if self.fails:
            raise NnsslError("nnUNetv2_train ended with exit code 1")
        folder = Path(variables["nnUNet_preprocessed"]) / command[1]
        plans_name = command[command.index("-p") + 1]
        weights = command[command.index("-pretrained_weights") + 1] if "-pretrained_weights" in command else None
        (split,) = read_json(folder / "splits_final.json")
        plans = read_json(folder / f"{plans_name}.json")
        data = folder / plans["configurations"][CONFIGURATION]["data_identifier"]
        self.seen = {"split": split, "plans": plans, "cases": {p.name for p in data.glob("*.b2nd")}, **variables}
        self.seen["weights"] = load_checkpoint(weights)["network_weights"] if weights else None
        fold = (
            Path(variables["nnUNet_results"])
            / command[1]
            / f"nnsslFinetuneTrainer__{plans_name}__{CONFIGURATION}/fold_0"
        )
        entries = [
            {"prediction_file": f"/x/{case}.nii.gz", "metrics": {"1": {"Dice": 0.5 + 0.1 * number}}}
            for number, case in enumerate(split["val"])
        ]
        record = {
            "train_cases": split["train"],
            "pretrained": weights is not None,
            "changed_tensors": {},
            "iterations": 20,
            "training_seconds": 8.0,
            **self.changes,
        }
        write_json(fold / "finetuning.json", record)
        early = {"iterations": 10, "training_seconds": 4.0, "summary": {"metric_per_case": entries}}
        write_json(fold / "evaluation_epoch_2.json", early)
        entries[0]["metrics"]["1"]["Dice"] = float("nan")
        write_json(fold / "validation" / "summary.json", {"metric_per_case": entries})
        (fold / "progress.png").touch()


@pytest.fixture
def training(monkeypatch):
    return Training(monkeypatch)


def job_of(benchmark: Benchmark, arm: str, output: Path) -> Path:
    (cell,) = [each for each in benchmark.cells() if each.arm == arm]
    return write_job(benchmark, cell, output, "cpu")


def test_the_training_sees_its_own_split_and_plans(benchmark, training, tmp_path):
    folder = job_of(benchmark, "scratch", tmp_path)
    work_on(folder)
    split = training.seen["split"]
    assert len(split["train"]) == 2 and split["val"] == sorted(benchmark.split.test)
    assert not {*split["train"]} & {*split["val"]}
    assert training.seen["plans"]["nnssl_finetuning"]["epochs"] == 4 and training.seen["weights"] is None
    assert len(training.seen["cases"]) == 12  # images and segmentations, by a link
    assert training.seen["nnUNet_n_proc_DA"] == "0"
    assert not (benchmark.preprocessed / "splits_final.json").exists()  # the dataset is left as it was
    result = read_json(folder / "result.json")
    assert [(p["iterations"], p["training_seconds"]) for p in result["curve"]] == [(10, 4.0), (20, 8.0)]
    first, second = split["val"]
    assert result["curve"][0]["dice"] == {first: {"1": 0.5}, second: {"1": 0.6}}
    assert result["curve"][1]["dice"] == {first: {"1": None}, second: {"1": 0.6}}
    assert shlex.split(result["command"])[0] == "nnUNetv2_train" and result["versions"]["nnunetv2"]
    assert (folder / "predictions" / "summary.json").is_file() and not (folder / "work").exists()


def test_a_finished_cell_is_not_trained_again(benchmark, training, tmp_path):
    folder = job_of(benchmark, "scratch", tmp_path)
    work_on(folder)
    training.fails = True
    work_on(folder)
    write_json(folder / "job.json", {**read_json(folder / "job.json"), "digest": "of another request"})
    with pytest.raises(NnsslError, match="exit code 1"):
        work_on(folder)


def test_weights_come_from_the_checkpoint_and_the_rest_from_the_seed(benchmark, training, tmp_path):
    import torch

    folder = job_of(benchmark, "MAE", tmp_path)
    work_on(folder)
    first = training.seen["weights"]
    source = load_checkpoint(benchmark.arms[1].checkpoint)["network_weights"]
    same = {name for name in first if name in source and torch.equal(first[name], source[name])}
    assert same and {name for name in source if name.startswith("eva.")} <= same
    (folder / "result.json").unlink()
    torch.manual_seed(12345)
    work_on(folder)
    assert all(torch.equal(first[name], value) for name, value in training.seen["weights"].items())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train_cases": ["case_00", "case_05"]}, "trained on .* instead of"),
        ({"pretrained": False}, "no pretrained weights arrived"),
    ],
)
def test_a_training_that_was_not_the_one_asked_for_is_not_believed(benchmark, training, tmp_path, changes, words):
    training.changes = changes
    folder = job_of(benchmark, "MAE", tmp_path)
    with pytest.raises(NnsslError, match=words):
        work_on(folder)
    assert not (folder / "result.json").exists()
    assert read_json(folder / "failure.json")["why"].split(" ")[0] in words
    training.changes = {}
    work_on(folder)
    assert (folder / "result.json").exists() and not (folder / "failure.json").exists()


def test_arms_are_fitted_before_any_work(benchmark, tmp_path):
    found = check_arms(benchmark)["MAE"]
    assert "SegmentationPrimus by MAETrainer" in found["about"] and found["pretrained_on"] is None
    run = benchmark.arms[1].checkpoint.parent
    cases = [benchmark.split.test[1], "elsewhere"]
    write_json(run / "settings.json", {"dataset": "Dataset004_Hippocampus", "cases": cases})  # as the checkpoint says
    assert check_arms(benchmark)["MAE"]["pretrained_on"]["test_cases"] == [benchmark.split.test[1]]
    save_checkpoint(run / "checkpoint_final.pth", content_of(plans_of("ResEncTiny")))
    with pytest.raises(NnsslError):
        check_arms(benchmark)
    (benchmark.preprocessed / "gt_segmentations" / f"{benchmark.split.test[0]}.nii.gz").unlink()
    with pytest.raises(NnsslError, match=f"1 files are missing, such as .*{benchmark.split.test[0]}"):
        check_arms(benchmark)


def test_a_run_that_is_still_training_may_overwrite_its_checkpoint(benchmark, training, tmp_path):
    kept = keep_checkpoints(benchmark, tmp_path)
    source, copy = benchmark.arms[1].checkpoint, kept.arms[1].checkpoint
    assert copy.parent == tmp_path / "checkpoints" and copy.read_bytes() == source.read_bytes()
    assert [cell.digest for cell in kept.cells()] == [cell.digest for cell in benchmark.cells()]
    before = load_checkpoint(source)["network_weights"]
    save_checkpoint(source, content_of(plans_of("PrimusTiny"), seed=7))
    work_on(job_of(kept, "MAE", tmp_path))
    name = next(key for key in before if key.startswith("eva.blocks"))
    assert training.seen["weights"][name].equal(before[name])
    assert keep_checkpoints(kept, tmp_path).arms[1].checkpoint == copy  # not copied again
    later = keep_checkpoints(benchmark, tmp_path)
    changed = [old.arm for old, new in zip(kept.cells(), later.cells(), strict=True) if old.digest != new.digest]
    assert changed == ["MAE"]
    with pytest.raises(NnsslError, match="has changed"):
        folder = job_of(later, "MAE", tmp_path / "other")
        later.arms[1].checkpoint.write_bytes(b"damaged")
        work_on(folder)


def test_exported_weights_take_part(benchmark, training, tmp_path):
    content = load_checkpoint(benchmark.arms[1].checkpoint)
    write_safetensors(tmp_path / "model.safetensors", content)
    arms = tuple(parse_arms([f"MAE={tmp_path / 'model.safetensors'}"], PLANS))
    kept = keep_checkpoints(replace(benchmark, arms=arms), tmp_path)
    work_on(job_of(kept, "MAE", tmp_path))
    name = next(key for key in content["network_weights"] if key.startswith("eva.blocks"))
    assert training.seen["weights"][name].equal(content["network_weights"][name])


def test_a_job_without_a_device_takes_what_its_machine_has(benchmark, training, tmp_path, monkeypatch):
    monkeypatch.setattr("nnssl_ext.benchmark.cell.best_device", lambda: "mps")
    cell = next(cell for cell in benchmark.cells() if cell.arm == "scratch")
    work_on(write_job(benchmark, cell, tmp_path, None))
    assert "-device mps" in read_json(cell.folder(tmp_path) / "result.json")["command"]


def test_checkpoints_of_nnssl_take_part(benchmark, training, tmp_path):
    plans = plans_of("ResEncTiny")
    kwargs = plans["configurations"][CONFIGURATION]["architecture"]["arch_kwargs"]
    content = nnssl_checkpoint("ResidualEncoderUNet", build_network(plans, CONFIGURATION, 1, 1), [*CROP], kwargs)
    file = tmp_path / "openmind.pth"
    save_checkpoint(file, content)
    arms = tuple(parse_arms([f"OpenMind={file}@nnsslResEncTinyPlans"], PLANS))
    theirs = replace(benchmark, arms=arms, settings={"nnsslResEncTinyPlans": FinetuneSettings(evaluations=1)})
    assert [arm.name for arm in arms] == ["scratch@nnsslResEncTinyPlans", "OpenMind"]
    assert "(nnssl)" in check_arms(theirs)["OpenMind"]["about"]
    work_on(job_of(theirs, "OpenMind", tmp_path / "out"))
    arrived, given = training.seen["weights"], content["network_weights"]
    assert all(arrived[key].equal(given[key]) for key in given if key.startswith("encoder."))


def test_what_nnssl_lists_is_compared_with_the_test_cases(benchmark, tmp_path):
    plans = plans_of("ResEncTiny")
    kwargs = plans["configurations"][CONFIGURATION]["architecture"]["arch_kwargs"]
    content = nnssl_checkpoint("ResidualEncoderUNet", build_network(plans, CONFIGURATION, 1, 1), [*CROP], kwargs)
    seen = benchmark.split.test[0]
    images = [{"image_path": f"/data/{name}_0000.nii.gz"} for name in (seen, "elsewhere")]
    content["init_args"]["pretrain_json"] = {"datasets": {"d": {"subjects": {"s": {"images": images}}}}}
    save_checkpoint(tmp_path / "openmind.pth", content)
    arms = tuple(parse_arms([f"OpenMind={tmp_path / 'openmind.pth'}@nnsslResEncTinyPlans"], PLANS))
    theirs = replace(benchmark, arms=arms, settings={"nnsslResEncTinyPlans": FinetuneSettings(evaluations=1)})
    known = check_arms(theirs)["OpenMind"]["pretrained_on"]
    assert known["test_cases"] == [seen] and known["cases"] == 2


def test_dice_is_told_by_case_as_the_files_are_named():
    entry = {
        "prediction_file": "/a/b/case_1.5mm.nii.gz",
        "metrics": {"1": {"Dice": 0.25}, "(1, 2)": {"Dice": float("nan")}},
    }
    assert dice_of({"metric_per_case": [entry]}, ".nii.gz") == {"case_1.5mm": {"1": 0.25, "(1, 2)": None}}


def test_a_training_ends_with_the_benchmark_that_was_killed(tmp_path):
    """A child in its own group, as `Workers` starts it; its parent is killed, and it must not go on."""
    alive = tmp_path / "alive"
    child = (
        "import time; from pathlib import Path; from nnssl_ext.benchmark.cell import _end_with_parent; _end_with_parent()\n"
        f"while True: Path({str(alive)!r}).touch(); time.sleep(0.1)"
    )
    parent = (
        "import subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', {json.dumps(child)}], start_new_session=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", parent])
    deadline = time.monotonic() + 60
    while not alive.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.kill()
    process.wait()
    time.sleep(3)
    alive.unlink()
    time.sleep(1)
    assert not alive.exists()
