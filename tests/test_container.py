"""The container's recipe as far as it can be checked without docker, and its two entry points on phantoms with lesions."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from nnssl_ext.dataset_conversion.lesion_phantoms import LesionPhantomSettings, write_lesion_task

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".container"
DOCKERFILE = (FOLDER / "Dockerfile").read_text()


def entry(name: str, *arguments: object, timeout: float = 3600) -> subprocess.CompletedProcess[str]:
    """Run an entry point as the image does: by the interpreter that has the package, its commands on the path."""
    import os

    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        [sys.executable, FOLDER / f"{name}.py", *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1"},
    )


def test_what_the_recipe_copies_exists_and_is_not_ignored():
    kept = {line[1:] for line in (FOLDER / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")}
    sources = [
        source
        for line in re.findall(r"^COPY (?!.*--from)(.*)$", DOCKERFILE, re.MULTILINE)
        for source in [word for word in line.split() if not word.startswith("--")][:-1]
    ]
    assert {".container/train.py", ".container/predict.py", ".container/constraints.txt", "nnssl_ext"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists() and source.split("/")[0] in kept, source


def test_the_image_is_pinned_and_has_no_rights():
    images = re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
    assert images and all(re.fullmatch(r"python:\d+\.\d+\.\d+-slim-\w+", image) for image in images)
    last = DOCKERFILE.rsplit("\nFROM ", 1)[1]
    (user,) = re.findall(r"^USER (\S+)", last, re.MULTILINE)
    assert int(user.split(":")[0]) >= 1000
    assert "HF_HUB_OFFLINE=1" in last and not re.search(r"pip install|curl|wget|apt", last)


def test_every_dependency_is_pinned_to_a_version_it_allows():
    pinned = dict(
        line.split("==") for line in (FOLDER / "constraints.txt").read_text().splitlines() if not line.startswith("#")
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "hub" in project["optional-dependencies"]
    for text in (*project["dependencies"], *project["optional-dependencies"]["hub"]):
        needed = Requirement(text)
        version = pinned[re.sub(r"[-_.]+", "-", needed.name).lower()]
        assert needed.specifier.contains(Version(version)), text


def test_the_workflow_builds_this_recipe_and_runs_both_entry_points_without_network():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "container.yml").read_text())
    commands = "\n".join(step.get("run", "") for step in workflow["jobs"]["build"]["steps"])
    assert "docker build -f .container/Dockerfile" in commands
    runs = re.findall(r"docker run(?:\\\n|.)*", commands)
    for name in (" train ", " predict "):
        assert any(f"nnssl-lesions{name}" in run and "--network none" in run for run in runs)


def test_the_arms_are_shown_before_anything_runs(tmp_path):
    listing = {"training": [{"image": f"i{n}", "label": f"l{n}"} for n in range(63)]}  # as MSD Lung
    (tmp_path / "dataset.json").write_text(json.dumps(listing))
    told = entry("train", tmp_path, tmp_path / "out", "--dry-run").stdout.splitlines()
    assert told == [
        " 10 % of 50 labels = 5 cases: scratch, mae, simmim",
        " 50 % of 50 labels = 25 cases: scratch, mae, simmim",
        "100 % of 50 labels = 50 cases: scratch, mae, simmim",
    ]
    assert not (tmp_path / "out").exists()
    refused = entry("train", tmp_path, tmp_path / "out", "--arms", "scratch", "--dry-run")
    assert refused.returncode == 1 and "name at least one pretraining" in refused.stderr


@pytest.mark.slow
def test_both_entry_points_on_phantoms(tmp_path):
    """All arms at one share with a budget of seconds: what each saw, what is reported, that it resumes, and that predict agrees.

    So short a training finds nothing, so label maps are empty here; the figures have their witnesses in test_reports_lesions.
    """
    task, out = tmp_path / "Task900_LesionPhantoms", tmp_path / "out"
    write_lesion_task(task, LesionPhantomSettings(lesions=(1, 4)), 8)
    budget = (
        "--epochs 2 --iterations_per_epoch 3 --val_iterations_per_epoch 1 --batch_size 2 --oversample_foreground 0.67"
    )
    arguments = (task, out, "--planner", "nnsslPlannerPrimusTiny", "--labels", 50, "--crops", 2, "-device", "cpu")
    arguments = (*arguments, "--plan", "--patch_size 24 24 24")
    small = ("-np", 1, "--pretrain", "--epochs 1 --iterations 3 --batch_size 2", "--finetune", budget)
    trained = entry("train", *arguments, *small)
    assert trained.returncode == 0, trained.stdout[-3000:] + trained.stderr[-3000:]

    results = json.loads((out / "results.json").read_text())
    rows = {row["arm"]: row for row in results["rows"]}
    assert set(rows) == {"scratch", "mae", "simmim"} and {row["cases"] for row in rows.values()} == {3}
    held_out = set(results["held_out"])
    assert len(held_out) == 2
    seen = (out / "pretraining_cases.txt").read_text().split()
    assert len(seen) == 12 and not {name.rsplit("_p", 1)[0] for name in seen} & held_out
    for run in (out / "nnssl_results").glob("Dataset007_*/MAETrainer__*"):
        told = json.loads((run / "settings.json").read_text())
        assert set(told["cases"]) == set(seen)
        assert told["settings"]["variant"] == ("simmim" if run.name.endswith("simmim") else "mae")
    subsets = set()
    for arm in rows:
        (record,) = (out / "models" / f"{arm}_50").glob("Dataset006_*/*/fold_0/finetuning.json")
        told = json.loads(record.read_text())
        assert told["pretrained"] == (arm != "scratch") and not set(told["train_cases"]) & held_out
        subsets.add(tuple(told["train_cases"]))
        assert {p.name.removesuffix(".nii.gz") for p in (record.parent / "validation").glob("*.nii.gz")} == held_out
        assert told["settings"]["oversample_foreground"] == 0.67
    assert len(subsets) == 1  # the same labels for every arm
    plans = json.loads(next((out / "nnUNet_preprocessed").glob("Dataset006_*/lesionPlans.json")).read_text())
    window = plans["foreground_intensity_properties_per_channel"]["0"]
    assert (window["percentile_00_5"], window["percentile_99_5"]) == (-1000, 1000)

    again = entry("train", *arguments, *small)
    assert again.returncode == 0 and "\n== " not in again.stdout  # all kept
    other = entry("train", *arguments, "--window", -900, 900, *small)
    assert other.returncode == 1 and "use another output folder" in other.stderr

    scans, truth = tmp_path / "scans", tmp_path / "truth"
    for folder, part in ((scans, "imagesTr"), (truth, "labelsTr")):
        folder.mkdir()
        for name in held_out:
            shutil.copy(task / part / f"{name}.nii.gz", folder)
    flags = ("--model", out, "--labels", 50, "--truth", truth, "-device", "cpu", "--fast")
    predicted = entry("predict", scans, tmp_path / "predictions", *flags)
    assert predicted.returncode == 0, predicted.stdout[-3000:] + predicted.stderr[-3000:]
    assert json.loads((tmp_path / "predictions" / "lesions.json").read_text())["lesions"] == rows["mae"]["lesions"]
    (fold,) = (out / "models" / "mae_50").glob("Dataset006_*/*/fold_0")
    for name in held_out:
        label, validated = (
            sitk.GetArrayFromImage(sitk.ReadImage(str(folder / f"{name}.nii.gz")))
            for folder in (tmp_path / "predictions", fold / "validation")
        )
        assert np.array_equal(label, validated)
    missing = entry("predict", scans, tmp_path / "x", "--model", out, "--labels", 70)
    assert missing.returncode == 1 and "it has mae_50, scratch_50, simmim_50" in missing.stderr
