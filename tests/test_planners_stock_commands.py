"""Our planners through nnU-Net's own commands, each in a fresh process, on real hippocampus scans."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import Workspace

from nnssl_ext.data.cases import list_cases
from nnssl_ext.files import read_json

CASES = 6


def add_hippocampus(
    space: Workspace, test_data: Path, dataset: str = "Dataset004_Hippocampus", labels: bool = True
) -> Path:
    """Some real cases as a raw data set; without labels it is image-only."""
    source, raw = test_data / "Task04_Hippocampus", space.raw / dataset
    (raw / "imagesTr").mkdir(parents=True)
    files = sorted((source / "imagesTr").glob("h*.nii.gz"))[:CASES]
    for file in files:
        shutil.copy(file, raw / "imagesTr" / file.name.replace(".nii.gz", "_0000.nii.gz"))
    content = {"channel_names": {"0": "MRI"}, "numTraining": CASES, "file_ending": ".nii.gz"}
    if labels:
        (raw / "labelsTr").mkdir()
        for file in files:
            shutil.copy(source / "labelsTr" / file.name, raw / "labelsTr")
        content["labels"] = {"background": 0, "Anterior": 1, "Posterior": 2}
    (raw / "dataset.json").write_text(json.dumps(content))
    return raw


@pytest.mark.slow
def test_plan_and_preprocess_both_backbones_beside_stock_ones(nnunet_env, test_data):
    add_hippocampus(nnunet_env, test_data)
    base = nnunet_env.preprocessed / "Dataset004_Hippocampus"
    options = ("-c", "3d_fullres", "-npfp", 1, "-np", 1)
    for preset in ("PrimusTiny", "ResEncTiny"):
        nnunet_env.run("nnUNetv2_plan_and_preprocess", "-d", 4, "-pl", f"nnsslPlanner{preset}", *options)
        plans = read_json(base / f"nnssl{preset}Plans.json")
        found = plans["configurations"]["3d_fullres"]
        assert found["nnssl"]["preset"] == preset and found["batch_size"] == 2
        assert found["data_identifier"] == f"nnssl{preset}Plans_3d_fullres"
        assert found["normalization_schemes"] == ["nnsslPercentileNormalization"]
        cases = list_cases(base / found["data_identifier"], tuple(found["spacing"]))
        assert len(cases) == CASES and all(case.channels == 1 for case in cases)

    ours = {p: p.stat().st_mtime_ns for p in base.glob("nnssl*/*.b2nd")}
    assert len(ours) == 2 * 2 * CASES
    # nnU-Net's ResEnc planners share one data folder and rewrite it; ours must not be it
    nnunet_env.run("nnUNetv2_plan_and_preprocess", "-d", 4, "-pl", "nnUNetPlannerResEncM", *options)
    assert {p: p.stat().st_mtime_ns for p in base.glob("nnssl*/*.b2nd")} == ours


@pytest.mark.slow
def test_image_only_copy_passes_every_check_after_foreground(nnunet_env, test_data):
    add_hippocampus(nnunet_env, test_data, "Dataset005_Unlabelled", labels=False)
    refused = nnunet_env.run("nnssl_plan", 5, "-pl", "nnsslPlannerPrimusTiny", check=False)
    assert refused.returncode == 2 and "run: nnssl_convert foreground -d 5" in refused.stderr
    for stock in ("nnUNetv2_plan_experiment", "nnUNetv2_plan_and_preprocess"):
        refused = nnunet_env.run(stock, "-d", 5, "-pl", "nnsslPlannerPrimusTiny", check=False)
        assert refused.returncode != 0 and "run: nnssl_convert foreground -d 5" in refused.stderr
    nnunet_env.run("nnssl_convert", "foreground", "-d", 5)
    command = (
        "nnUNetv2_plan_and_preprocess",
        "-d",
        5,
        "--verify_dataset_integrity",
        "-c",
        "3d_fullres",
        "-npfp",
        1,
        "-np",
        1,
    )
    finished = nnunet_env.run(*command, "-pl", "nnsslPlannerPrimusTiny")
    assert "verify_dataset_integrity Done" in finished.stdout
    base = nnunet_env.preprocessed / "Dataset005_Unlabelled"
    assert len(list_cases(base / "nnsslPrimusTinyPlans_3d_fullres", (1.0, 1.0, 1.0))) == CASES

    png = nnunet_env.results / "crops.png"
    preview = nnunet_env.run("nnssl_plan", 5, "-pl", "nnsslPlannerPrimusTiny", "--png", png, "--batch_size", 3)
    assert png.stat().st_size > 10_000
    for words in ("1x1x1 mm", "token", "batch        3 cases", "parameters", "memory", "hours", "heavy tails"):
        assert words in preview.stdout
    saved = read_json(base / "nnsslPrimusTinyPlans.json")
    assert saved["configurations"]["3d_fullres"]["nnssl"]["batch_size"] == 8  # the preview wrote nothing


def test_unknown_planner_is_answered_with_the_nearest(nnunet_env):
    refused = nnunet_env.run("nnssl_plan", 5, "-pl", "nnsslPlannerPrimusTini", check=False)
    assert refused.returncode == 2 and "did you mean 'nnsslPlannerPrimusTiny'?" in refused.stderr


def test_help_lists_the_planners_without_torch(nnunet_env):
    code = "import sys; sys.argv = ['nnssl_plan', '-h']; import nnssl_ext.cli.plan as p\ntry: p.main()\nfinally: print('torch' in sys.modules)"
    shown = nnunet_env.run("python", "-c", code).stdout
    for preset in (
        "PrimusTiny",
        "PrimusS",
        "PrimusB",
        "PrimusM",
        "PrimusL",
        "ResEncTiny",
        "ResEncM",
        "ResEncL",
        "ResEncXL",
    ):
        assert f"nnsslPlanner{preset}" in shown
    assert shown.rstrip().endswith("False")
