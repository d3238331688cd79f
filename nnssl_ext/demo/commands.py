"""The commands of the main job, exactly as a user types them."""

from __future__ import annotations

from pathlib import Path

from nnssl_ext.demo.runner import Step
from nnssl_ext.demo.settings import ARMS, CONFIGURATION, PLANNERS, PLANS, DemoSettings

DATASET_ID = 900
METHOD = "MAETrainer"
FINETUNING = "nnsslFinetuneTrainer"
EPOCHS = 10
"""Lines in each log: pretraining and fine-tuning are cut into this many epochs."""
BATCH_SIZE = 2


def dataset_folder(settings: DemoSettings) -> str:
    """``Dataset900_Name``."""
    return f"Dataset{DATASET_ID}_{settings.name}"


def run_folder(settings: DemoSettings, backbone: str) -> Path:
    """Where `nnssl_train` writes."""
    run = f"{METHOD}__{PLANS[backbone]}__{CONFIGURATION}"
    return settings.output / "nnssl_results" / dataset_folder(settings) / run


def fold_folder(settings: DemoSettings, backbone: str, arm: str) -> Path:
    """Where `nnUNetv2_train` writes."""
    run = f"{FINETUNING}__{_adapted(backbone)}__{CONFIGURATION}"
    return settings.results(arm) / dataset_folder(settings) / run / "fold_0"


def conversion(settings: DemoSettings, source: Path) -> Step:
    """A Medical Segmentation Decathlon task into a raw dataset."""
    target = settings.output / "nnUNet_raw" / dataset_folder(settings)
    command = ("nnssl_convert", "msd", str(source), "-d", str(DATASET_ID), "--name", settings.name)
    return Step("convert", (*command, "--limit", str(settings.cases), "-np", "1"), (target,))


def planning(settings: DemoSettings) -> list[Step]:
    """Stock planning and preprocessing, once per backbone; one after the other, because they share the fingerprint.

    The first begins with an empty folder: stock commands keep a fingerprint and a split that they find, of whatever cases.
    """
    steps = []
    folder = settings.output / "nnUNet_preprocessed" / dataset_folder(settings)
    for number, backbone in enumerate(settings.backbones):
        command = ("nnUNetv2_plan_and_preprocess", "-d", str(DATASET_ID), "-pl", PLANNERS[backbone])
        verify = () if number else ("--verify_dataset_integrity",)
        processes = ("-c", CONFIGURATION, "-npfp", "1", "-np", "2", *verify)
        plans = folder / f"{PLANS[backbone]}.json"
        products = (plans,) if number else (folder, plans)
        steps.append(Step(f"{backbone}: plan and preprocess", (*command, *processes), products))
    return steps


def learning(settings: DemoSettings, backbone: str, labels: list[int]) -> list[Step]:
    """Pretraining, then both arms up to their Dice on the held-out cases."""
    results = settings.output / "nnssl_results" / dataset_folder(settings)
    adapted = results / f"adapted__{_adapted(backbone)}__{CONFIGURATION}"
    pretrain = (
        *("nnssl_train", str(DATASET_ID), CONFIGURATION, "-tr", METHOD, "-p", PLANS[backbone]),
        *("-device", settings.device, "--batch_size", str(BATCH_SIZE)),
        *("--epochs", str(EPOCHS), "--iterations", str(settings.pretrain_steps // EPOCHS)),
    )
    adapt = (
        *("nnssl_adapt", str(run_folder(settings, backbone) / "checkpoint_final.pth")),
        *("-d", str(DATASET_ID), "-p", PLANS[backbone], "--name", "MAE"),
        *("--epochs", str(EPOCHS), "--iterations_per_epoch", str(settings.finetune_steps // EPOCHS)),
        *("--val_iterations_per_epoch", "1", "--train_cases", str(settings.labelled), "--batch_size", str(BATCH_SIZE)),
    )
    steps = [
        Step(f"{backbone}: pretrain", pretrain, (run_folder(settings, backbone),)),
        Step(f"{backbone}: adapt", adapt, (adapted,)),
    ]
    for arm in ARMS:
        weights = ("-pretrained_weights", str(adapted / "checkpoint_final.pth")) if arm == "pretrained" else ()
        steps += _arm(settings, backbone, arm, weights, labels)
    return steps


def _arm(settings: DemoSettings, backbone: str, arm: str, weights: tuple[str, ...], labels: list[int]) -> list[Step]:
    dataset = settings.output / "nnUNet_raw" / dataset_folder(settings)
    predictions = settings.predictions(backbone, arm)
    own = {"nnUNet_results": str(settings.results(arm))}
    model = ("-p", _adapted(backbone), "-tr", FINETUNING, "-device", settings.device)
    train = ("nnUNetv2_train", str(DATASET_ID), CONFIGURATION, "0", *model, *weights)
    predict = (
        *("nnUNetv2_predict", "-i", str(dataset / "imagesTs"), "-o", str(predictions)),
        *("-d", str(DATASET_ID), "-c", CONFIGURATION, "-f", "0", *model, "--disable_tta", "-npp", "1", "-nps", "1"),
    )
    evaluate = (
        *("nnUNetv2_evaluate_simple", str(dataset / "labelsTs"), str(predictions)),
        *("-l", *map(str, labels), "-np", "1"),
    )
    return [
        Step(f"{backbone}: train {arm}", train, (fold_folder(settings, backbone, arm),), own),
        Step(f"{backbone}: predict {arm}", predict, (predictions,), own),
        Step(f"{backbone}: evaluate {arm}", evaluate, (predictions / "summary.json",)),
    ]


def _adapted(backbone: str) -> str:
    return f"{PLANS[backbone]}_MAE"
