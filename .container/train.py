#!/usr/bin/env python3
"""Lesion segmentation from a Medical Segmentation Decathlon task: pretrain on crops around the lungs, then fine-tune.

Arms (scratch, MAE, SimMIM) x shares of the labels, all with the same plans, cases and steps. Each is judged on cases that neither
pretraining nor fine-tuning saw, by nnU-Net's Dice and by lesion-wise detection. Every step is a command that is printed before it
runs. A stopped run continues when it is started again.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

CONFIGURATION, PLANS, TRAINER = "3d_fullres", "lesionPlans", "nnsslFinetuneTrainer"
METHODS = {"mae": (), "simmim": ("--variant", "simmim", "--name", "simmim")}
FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "nnssl_results")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("task", type=Path, help="task folder with labels, e.g. Task06_Lung")
    p.add_argument("out", type=Path, help="everything is written below it")
    p.add_argument("--planner", default="nnsslPlannerPrimusM", help="(%(default)s)")
    p.add_argument("--arms", nargs="+", choices=("scratch", *METHODS), default=["scratch", *METHODS], help="(all)")
    p.add_argument(
        "--labels", nargs="+", type=int, default=[10, 50, 100], help="percent of the training labels (10 50 100)"
    )
    p.add_argument("--held-out", type=float, default=0.2, help="share of the cases to judge on (%(default)s)")
    p.add_argument("--window", nargs=2, type=float, default=[-1000, 1000], help="HU (-1000 1000)")
    p.add_argument("--around", choices=("lungs", "body"), default="lungs", help="pretraining crops (%(default)s)")
    p.add_argument("--crops", type=int, default=8, help="pretraining crops per case (%(default)s)")
    p.add_argument("--label", type=int, default=1, help="value of lesions (%(default)s)")
    p.add_argument("--id", type=int, default=6, help="of the nnU-Net dataset; the crops get the next one (%(default)s)")
    p.add_argument("--plan", default="", help='more flags of nnssl_plan, e.g. "-gpu_memory_target 40"')
    p.add_argument("--pretrain", default="", help='more flags of nnssl_train, e.g. "--epochs 200"')
    p.add_argument(
        "--finetune",
        default="--oversample_foreground 0.67",
        help='flags of nnssl_adapt (%(default)s): crops centred on lesions, "--epochs 150", ...',
    )
    p.add_argument("-device", default="cuda", choices=("cuda", "cpu", "mps"), help="(%(default)s)")
    p.add_argument("-np", type=int, default=4, help="processes for conversion and preprocessing (%(default)s)")
    p.add_argument("--dry-run", action="store_true", help="print the arms and their sizes, run nothing")
    return p


class Job:
    """Runs commands in their own nnU-Net folders and remembers which are done."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.done = out / "done"
        self.done.mkdir(parents=True, exist_ok=True)
        for name in FOLDERS:
            os.environ[name] = str(out / name)
            (out / name).mkdir(exist_ok=True)

    def run(self, step: str, *command: object, results: Path | None = None, resumed: tuple[str, ...] = ()) -> None:
        """Run `command` once; with `resumed` flags in place of `-pretrained_weights` where it had begun before."""
        line = shlex.join(map(str, command))
        mark = self.done / step
        if mark.exists():
            if mark.read_text() != line:
                sys.exit(
                    f"step {step} was run as\n  {mark.read_text()}\nand is now\n  {line}\nuse another output folder"
                )
            print(f"kept: {step}", flush=True)
            return
        print(f"\n== {step}\n{line} {' '.join(resumed)}", flush=True)
        variables = {**os.environ, **({"nnUNet_results": str(results)} if results else {})}
        if subprocess.run([*map(str, command), *resumed], env=variables, check=False).returncode:
            sys.exit(f"step {step} failed; mend it and start again: what is done is kept")
        mark.write_text(line)

    def dataset(self, number: int, root: str = "nnUNet_raw") -> Path:
        (found,) = (self.out / root).glob(f"Dataset{number:03d}_*")
        return found


def main() -> None:
    args = parser().parse_args()
    learners = [arm for arm in args.arms if arm in METHODS]
    if not learners:
        sys.exit("name at least one pretraining among --arms: scratch takes its plans from there")
    if args.dry_run:
        cases = len(json.loads((args.task / "dataset.json").read_text())["training"])
        training = cases - max(1, round(args.held_out * cases))
        for share in args.labels:
            print(f"{share:3d} % of {training} labels = {count_of(share, training)} cases: {', '.join(args.arms)}")
        return
    job = Job(args.out.absolute())
    train, test = prepare(job, args)
    checkpoints = {arm: pretrain(job, args, arm) for arm in learners}
    rows = []
    for share in args.labels:
        for arm in [*learners, *(arm for arm in args.arms if arm not in METHODS)]:
            rows.append({"arm": arm, "labels": share, "cases": count_of(share, len(train))})
            rows[-1] |= finetune(job, args, arm, rows[-1]["cases"], share, checkpoints, learners[0])
    report(job, rows, test)


def count_of(share: int, training: int) -> int:
    return max(1, round(share / 100 * training))


def prepare(job: Job, args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Raw datasets, one split for all arms, plans, and preprocessed scans and crops."""
    number, crops = args.id, args.id + 1
    job.run("convert", "nnssl_convert", "msd", args.task.absolute(), "-d", number, "-np", args.np)
    raw = job.dataset(number)
    names = sorted(path.name.removesuffix(".nii.gz") for path in (raw / "labelsTr").glob("*.nii.gz"))
    order = np.random.default_rng(0).permutation(len(names))
    held_out = max(1, round(args.held_out * len(names)))
    test, train = (sorted(names[i] for i in part) for part in (order[:held_out], order[held_out:]))

    job.run("fingerprint", "nnUNetv2_extract_fingerprint", "-d", number, "--verify_dataset_integrity", "-np", args.np)
    planned = job.dataset(number, "nnUNet_preprocessed")
    (planned / "splits_final.json").write_text(json.dumps([{"train": train, "val": test}]))
    plan = ("nnssl_plan", number, "-pl", args.planner, "-overwrite_plans_name", PLANS, "--window", *args.window)
    job.run("plan", *plan, "--write", *shlex.split(args.plan))
    job.run(
        "preprocess", "nnUNetv2_preprocess", "-d", number, "-plans_name", PLANS, "-c", CONFIGURATION, "-np", args.np
    )

    found = json.loads((planned / f"{PLANS}.json").read_text())["configurations"][CONFIGURATION]
    edges = [1.5 * p * s for p, s in zip(found["nnssl"]["global_crop"], found["spacing"], strict=True)]  # room to move
    size = ("--size-mm", *(f"{edge:.1f}" for edge in edges), "--count", args.crops, "--min-foreground", 0.3)
    around = ("--around", args.around, "--name", "LungCrops" if args.around == "lungs" else "BodyCrops")
    job.run("crops", "nnssl_convert", "patches", "-d", number, "-o", crops, *size, *around, "-np", args.np)
    cut = job.dataset(crops)
    target = job.out / "nnUNet_preprocessed" / cut.name
    target.mkdir(exist_ok=True)
    shutil.copy(cut / "dataset.json", target / "dataset.json")
    job.run(
        "crops_plans", "nnUNetv2_move_plans_between_datasets", "-s", number, "-t", crops, "-sp", PLANS, "-tp", PLANS
    )
    job.run(
        "crops_preprocess",
        "nnUNetv2_preprocess",
        "-d",
        crops,
        "-plans_name",
        PLANS,
        "-c",
        CONFIGURATION,
        "-np",
        args.np,
    )
    patches = json.loads((cut / "patches.json").read_text())["patches"]
    seen = [name for name, entry in patches.items() if entry["source"] in train]
    (job.out / "pretraining_cases.txt").write_text("\n".join(seen) + "\n")
    return train, test


def pretrain(job: Job, args: argparse.Namespace, arm: str) -> Path:
    """The arm's checkpoint."""
    flags = (*METHODS[arm], "--cases", job.out / "pretraining_cases.txt", "-device", args.device)
    command = ("nnssl_train", args.id + 1, CONFIGURATION, "-tr", "MAETrainer", "-p", PLANS, *flags, "--c")
    job.run(f"pretrain_{arm}", *command, *shlex.split(args.pretrain))
    ending = "__simmim" if arm == "simmim" else ""
    run = f"MAETrainer__{PLANS}__{CONFIGURATION}{ending}"
    return job.out / "nnssl_results" / job.dataset(args.id + 1).name / run / "checkpoint_final.pth"


def finetune(
    job: Job, args: argparse.Namespace, arm: str, cases: int, share: int, checkpoints: dict[str, Path], first: str
) -> dict[str, float | None]:
    """Train one arm and judge it; scratch differs from the first pretrained arm in its weights alone."""
    source, dataset = arm if arm in checkpoints else first, job.dataset(args.id).name
    name = f"{source}{share}"
    adapt = ("nnssl_adapt", checkpoints[source], "-d", args.id, "-p", PLANS, "--name", name, "--train_cases", cases)
    job.run(f"adapt_{name}", *adapt, *shlex.split(args.finetune))
    plans = f"{PLANS}_{name}"
    weights = job.out / "nnssl_results" / dataset / f"adapted__{plans}__{CONFIGURATION}" / "checkpoint_final.pth"

    results = job.out / "models" / f"{arm}_{share}"
    fold = results / dataset / f"{TRAINER}__{plans}__{CONFIGURATION}" / "fold_0"
    begun = any((fold / f"checkpoint_{state}.pth").exists() for state in ("latest", "final"))
    start = ("--c",) if begun else ("-pretrained_weights", str(weights)) if arm in checkpoints else ()
    command = ("nnUNetv2_train", args.id, CONFIGURATION, 0, "-p", plans, "-tr", TRAINER, "-device", args.device)
    job.run(f"train_{arm}_{share}", *command, results=results, resumed=start)
    record = json.loads((fold / "finetuning.json").read_text())
    if record["pretrained"] != (arm in checkpoints):
        sys.exit(f"{fold}: pretrained weights {'are missing' if arm in checkpoints else 'came in unasked'}")
    truth = job.out / "nnUNet_preprocessed" / dataset / "gt_segmentations"
    measured = job.out / "models" / f"{arm}_{share}" / "lesions.json"
    job.run(f"lesions_{arm}_{share}", "nnssl_lesions", fold / "validation", truth, "-l", args.label, "-o", measured)
    figures = json.loads(measured.read_text())
    mean = json.loads((fold / "validation" / "summary.json").read_text())["foreground_mean"]["Dice"]
    kept = ("sensitivity", "precision", "false_positives_per_case", "lesions")
    return {"dice": mean, **{key: figures[key] for key in kept}}


def report(job: Job, rows: list[dict], test: list[str]) -> None:
    """The table, on screen and as ``results.json``."""
    (job.out / "results.json").write_text(json.dumps({"held_out": test, "rows": rows}, indent=2) + "\n")
    columns = ("arm", "labels", "cases", "dice", "sensitivity", "precision", "false_positives_per_case")
    print(f"\n{len(test)} held-out cases, {rows[0]['lesions']} lesions; one seed each: no verdict without repetition")
    print("  ".join(column.rjust(12) for column in columns))
    for row in rows:
        cells = (row[column] for column in columns)
        print(
            "  ".join((f"{c:.3f}" if isinstance(c, float) else "-" if c is None else str(c)).rjust(12) for c in cells)
        )


if __name__ == "__main__":
    main()
