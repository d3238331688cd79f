"""What must be known, and must fit, before the first cell runs."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from nnssl_ext.benchmark.matrix import Arm, Benchmark, Split
from nnssl_ext.checkpoints.io import load_checkpoint
from nnssl_ext.checkpoints.provenance import training_cases
from nnssl_ext.data.cases import list_cases
from nnssl_ext.errors import NnsslError, unknown_name
from nnssl_ext.files import read_json, sha256_of
from nnssl_ext.monitors.probe import LABEL_FREE, RENAME, is_labelled
from nnssl_ext.plans import configuration_of, preprocessed_folder, read_plans


def find_split(dataset: str, plans_name: str, configuration: str, fold: int, test: Path | None = None) -> Split:
    """Test cases and those to draw labelled ones from.

    Args:
        dataset: ``Dataset004_Hippocampus``; preprocessed for the plans.
        fold: of ``splits_final.json``, or of nnU-Net's default split where there is none: its validation cases are tested on.
        test: a file that names other test cases, one per line; all others are then for training.

    Raises:
        NnsslError: unknown cases or fold, or test cases among the training cases.
    """
    found = configuration_of(read_plans(dataset, plans_name), configuration)
    base = preprocessed_folder(dataset)
    z, y, x = found["spacing"]
    known = [case.identifier for case in list_cases(base / found["data_identifier"], (z, y, x))]
    if test is not None:
        try:
            named = test.read_text().split()
        except OSError as error:
            raise NnsslError(f"cannot read {test}: {error}", "give a file with one case per line") from error
        for name in named:
            if name not in known:
                raise unknown_name(f"test case in {test}", name, known)
        return Split(
            tuple(case for case in known if case not in named), tuple(sorted({*named})), f"named in {test.name}"
        )
    splits_file = base / "splits_final.json"
    if splits_file.is_file():
        splits, about = read_json(splits_file), "its splits_final.json"
    else:
        from nnunetv2.utilities.crossval_split import generate_crossval_split

        if len(known) < 5:
            raise NnsslError(
                f"{dataset} has {len(known)} case(s), and nnU-Net's default split has five folds",
                "name the cases to test on with --test FILE, or write a splits_final.json",
            )
        splits, about = generate_crossval_split(sorted(known)), "nnU-Net's default split"
    if not 0 <= fold < len(splits):
        raise NnsslError(f"fold {fold} of {dataset}: there are {len(splits)}", f"choose -f 0 to {len(splits) - 1}")
    chosen = {part: tuple(sorted(map(str, splits[fold][part]))) for part in ("train", "val")}
    for name in (*chosen["train"], *chosen["val"]):
        if name not in known:
            raise unknown_name(f"case in {about} of {dataset}", name, known)
    return Split(chosen["train"], chosen["val"], f"fold {fold} of {about}, validation cases for testing")


def check_arms(benchmark: Benchmark) -> dict[str, dict[str, Any]]:
    """Fit every checkpoint to its plans once, so that what does not fit is named now and not in an hour.

    Returns:
        Arm name -> what it is (``about``), ``notes``, and ``pretrained_on``: dataset, number of cases, and which test cases were
        among them; None where the run's ``settings.json`` is not beside the checkpoint.

    Raises:
        NnsslError: a checkpoint that cannot be read or does not fit, more labelled cases than there are, no labels, or missing
            files.
    """
    from nnssl_ext.checkpoints.adapt import adapt, read_pretrained

    dataset = read_json(benchmark.preprocessed / "dataset.json")
    if not is_labelled(dataset):
        raise NnsslError(f"{benchmark.dataset} has no labels to learn to tell: {LABEL_FREE}", RENAME)
    _check_files(benchmark, dataset["file_ending"])
    about: dict[str, dict[str, Any]] = {}
    for arm in benchmark.arms:
        plans = benchmark.request(arm, max(benchmark.train_cases), benchmark.epochs[0], 0)["plans"]
        if arm.checkpoint is None:
            continue
        source = read_pretrained(arm.checkpoint)
        adapted = adapt(source, plans, benchmark.configuration, dataset, arm.plans)
        about[arm.name] = {
            "about": str(source),
            "notes": [*source.notes, *adapted.notes],
            "pretrained_on": _pretrained_on(arm.checkpoint, benchmark.split),
        }
    return about


def _check_files(benchmark: Benchmark, ending: str) -> None:
    """Whether everything that trainings read is there; `ending` is that of label files."""
    base, test = benchmark.preprocessed, benchmark.split.test
    wanted = [base / "dataset_fingerprint.json", *(base / "gt_segmentations" / f"{case}{ending}" for case in test)]
    for plans_name in benchmark.settings:
        plans = read_plans(benchmark.dataset, plans_name)
        data = base / configuration_of(plans, benchmark.configuration)["data_identifier"]
        wanted += [data / f"{case}.b2nd" for case in (*benchmark.split.pool, *test)]
    if missing := [path for path in wanted if not path.is_file()]:
        raise NnsslError(
            f"{len(missing)} files are missing, such as {missing[0]}",
            f"nnUNetv2_preprocess -d {benchmark.dataset} -plans_name PLANS -c {benchmark.configuration}, after planning",
        )


def keep_checkpoints(benchmark: Benchmark, output: Path) -> Benchmark:
    """The benchmark with copies of its checkpoints, named by their content: a run that is still training may overwrite its own
    at any time, and all cells of an arm must have the same weights.

    Raises:
        NnsslError: they cannot be written.
    """
    folder = (output / "checkpoints").resolve()

    def kept(arm: Arm) -> Arm:
        if arm.checkpoint is None:
            return arm
        kind = arm.checkpoint.suffix  # says how it is read
        target = folder / f"{arm.name}-{sha256_of(arm.checkpoint)[:16]}{kind}"
        if target.exists():
            return replace(arm, checkpoint=target)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            copy = Path(shutil.copyfile(arm.checkpoint, Path(scratch) / f"copy{kind}"))
            target = folder / f"{arm.name}-{sha256_of(copy)[:16]}{kind}"  # it may have changed since
            copy.replace(target)
        return replace(arm, checkpoint=target)

    try:
        folder.mkdir(parents=True, exist_ok=True)
        return replace(benchmark, arms=tuple(kept(arm) for arm in benchmark.arms))
    except OSError as error:
        raise NnsslError(f"cannot copy checkpoints to {folder}: {error}", "free space, or choose another -o") from error


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may be set to, for one GPU each."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]


def _pretrained_on(checkpoint: Path, split: Split) -> dict[str, Any] | None:
    """Dataset, number of cases and the test cases among them, of the run and those it started from; None if a part of that is
    unknown and no test case is found in the rest."""
    known = training_cases(checkpoint, load_checkpoint(checkpoint))
    seen = sorted(known.seen & {*split.test})
    if known.unrecorded and not seen:
        return None
    return {
        "dataset": ", ".join(dict.fromkeys(run.dataset for run in known.runs)),
        "cases": len(frozenset().union(*(run.cases for run in known.runs))),
        "test_cases": seen,
    }
