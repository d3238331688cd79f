"""Real scans through the stock console commands: convert, plan, train from a checkpoint, validate again, predict."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

pytestmark = pytest.mark.slow

# At the default rates the small ResEnc passes 0.8 Dice within 60 iterations (measured with 5 and 20 labelled cases);
# the small Primus needs more than this test has time for, so it only has to come through.
RUNS = {
    "ResEncTiny": ({"epochs": 3, "iterations_per_epoch": 20, "evaluations": 1}, 0.6),
    "PrimusTiny": ({"epochs": 2, "iterations_per_epoch": 2}, 0.0),
}


@pytest.mark.parametrize("preset", RUNS)
def test_stock_commands_train_and_predict(nnunet_env, test_data: Path, monkeypatch, preset: str) -> None:
    nnunet_env.run("nnssl_convert", "msd", test_data / "Task04_Hippocampus", "-d", 4, "--limit", 18, "-np", 1)
    planner, plans_name = f"nnsslPlanner{preset}", f"nnssl{preset}Plans"
    nnunet_env.run(*("nnUNetv2_plan_and_preprocess", "-d", 4, "-pl", planner, "-c", "3d_fullres", "-npfp", 1, "-np", 1))
    (dataset,) = nnunet_env.preprocessed.glob("Dataset004_*")
    cases = sorted(p.name.removesuffix(".nii.gz") for p in (dataset / "gt_segmentations").iterdir())
    test = cases[14:]
    (dataset / "splits_final.json").write_text(json.dumps([{"train": cases[:12], "val": cases[12:14]}]))
    settings, least = RUNS[preset]
    plans = json.loads((dataset / f"{plans_name}.json").read_text())
    plans["nnssl_finetuning"] = {**settings, "val_iterations_per_epoch": 1, "seed": 5}
    (dataset / f"{plans_name}.json").write_text(json.dumps(plans))
    weights = nnunet_env.pretraining / "checkpoint_final.pth"
    torch.save({"network_weights": other_weights(plans)}, weights)

    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    model = ("4", "3d_fullres", "0", "-p", plans_name, "-tr", "nnsslFinetuneTrainer", "-device", "cpu")
    trained = nnunet_env.run("nnUNetv2_train", *model, "-pretrained_weights", weights)
    assert "pretrained weights arrived: " in trained.stdout
    (model_folder,) = nnunet_env.results.glob(f"Dataset004_*/nnsslFinetuneTrainer__{plans_name}__3d_fullres")
    summary = model_folder / "fold_0" / "validation" / "summary.json"
    for early in summary.parent.parent.glob("evaluation_epoch_*.json"):
        assert len(json.loads(early.read_text())["summary"]["metric_per_case"]) == 2
    assert (summary.parent.parent / "evaluation_epoch_1.json").exists() == ("evaluations" in settings)
    before = json.loads(summary.read_text())["foreground_mean"]["Dice"]
    nnunet_env.run("nnUNetv2_train", *model, "--val")
    assert json.loads(summary.read_text())["foreground_mean"]["Dice"] == pytest.approx(before, abs=1e-6)

    (raw,) = nnunet_env.raw.glob("Dataset004_*")
    for case in test:
        (raw / "imagesTs").mkdir(exist_ok=True)
        (raw / "imagesTr" / f"{case}_0000.nii.gz").rename(raw / "imagesTs" / f"{case}_0000.nii.gz")
    output = nnunet_env.results / "predicted"
    nnunet_env.run(
        *("nnUNetv2_predict", "-i", raw / "imagesTs", "-o", output, "-d", 4, "-c", "3d_fullres", "-f", 0),
        *("-p", plans_name, "-tr", "nnsslFinetuneTrainer", "-device", "cpu", "-npp", 1, "-nps", 1),
    )
    scores = [dice(output / f"{case}.nii.gz", raw / "labelsTr" / f"{case}.nii.gz") for case in test]
    assert len(scores) == 4 and np.mean(scores) >= least


def other_weights(plans: dict) -> dict[str, torch.Tensor]:
    """What a checkpoint for these plans holds: a whole network's state dict, of another initialisation."""
    from nnssl_ext.networks.build import build_network

    torch.manual_seed(99)
    return build_network(plans, "3d_fullres", 1, 3, True).state_dict()


def dice(predicted: Path, truth: Path) -> float:
    """Mean of both labels; the prediction must lie on the image's own grid."""
    found, true = nib.load(predicted), nib.load(truth)
    assert found.shape == true.shape and np.allclose(found.affine, true.affine)
    a, b = np.asarray(found.dataobj), np.asarray(true.dataobj)
    return float(np.mean([2 * ((a == c) & (b == c)).sum() / ((a == c).sum() + (b == c).sum()) for c in (1, 2)]))
