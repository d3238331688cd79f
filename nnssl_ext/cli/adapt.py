"""``nnssl_adapt``: a pretrained checkpoint for another data set."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnssl_ext.cli._console import console
from nnssl_ext.cli._run import run
from nnssl_ext.cli._settings import settings_from_flags
from nnssl_ext.files import read_json
from nnssl_ext.paths import dataset_id

if TYPE_CHECKING:
    from nnssl_ext.checkpoints.adapt import Adapted


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="nnssl_adapt",
        description="Fit a pretrained checkpoint (of nnssl-ext, nnssl or OpenMind) to another data set: write plans, a complete "
        "checkpoint that stock nnUNetv2_train loads with -pretrained_weights, and a table of what became of every tensor.",
        epilog="Every fine-tuning setting is a flag too and goes into the plans for nnsslFinetuneTrainer, e.g. "
        "--epochs 50 --schedule sawtooth; nnssl_adapt --settings lists them.",
    )
    p.add_argument(
        "checkpoint",
        type=Path,
        nargs="?",
        help="e.g. checkpoint_final.pth, an exported folder, or hf:OWNER/NAME[@REVISION]",
    )
    p.add_argument("-d", metavar="TARGET", help="data set id or name, e.g. 4 or Dataset004_Hippocampus")
    p.add_argument("-p", metavar="PLANS", help="existing plans of the data set, ours or nnU-Net's (default: derived)")
    p.add_argument("-c", metavar="CONFIG", default="3d_fullres", help="configuration of -p (default: 3d_fullres)")
    p.add_argument("--name", help="ending of the new plans' name (default: the pretraining method)")
    p.add_argument(
        "--patch_size",
        type=int,
        nargs=3,
        metavar=("Z", "Y", "X"),
        help="without -p: voxels (default: the checkpoint's)",
    )
    p.add_argument(
        "--fix_nnssl_axes", action="store_true", help="undo the swapped axes of positions in nnssl's Primus MAE"
    )
    p.add_argument(
        "--settings",
        action="store_true",
        help="list the fine-tuning settings and exit; with -d and -p, with the defaults that these plans have",
    )
    return p


def main() -> None:
    """Entry point of ``nnssl_adapt``."""
    run(_main)


def _main() -> int:
    base = parser()
    args, rest = base.parse_known_args()
    if args.settings:
        from nnssl_ext.plans import read_plans

        known = bool(args.d and args.p)
        if not known:
            print("Defaults of a ResEnc of full size follow; with -d and -p, those that these plans have.")
        _settings(read_plans(args.d, args.p) if known else {}, args.c, ["--help"])
    if args.checkpoint is None or args.d is None:
        base.error("CHECKPOINT and -d are required, e.g. nnssl_adapt checkpoint_final.pth -d 4")
    if args.p and args.patch_size:
        base.error("--patch_size belongs to derived plans; -p brings its own")

    from nnssl_ext.checkpoints.adapt import adapt, adapted_name, read_pretrained, replaced, write_adapted
    from nnssl_ext.checkpoints.target import derive_plans
    from nnssl_ext.paths import dataset_name, folder
    from nnssl_ext.plans import preprocessed_folder, read_plans

    folder("nnssl_results")  # name a missing variable before the work, not after it
    out = console()
    source = read_pretrained(args.checkpoint, args.fix_nnssl_axes)
    out.print(str(source), *source.notes, sep="\n  note: ", markup=False)
    name = args.name or source.method.removesuffix("Trainer")
    if args.p:
        plans_name = adapted_name(args.p, name)
        plans = read_plans(args.d, args.p)
        dataset_json = read_json(preprocessed_folder(args.d) / "dataset.json")
    else:
        plans_name = adapted_name("nnsslAdaptedPlans", name)
        plans = derive_plans(source, args.d, plans_name, args.patch_size)
        dataset_json = read_json(folder("nnUNet_raw") / dataset_name(args.d, "nnUNet_raw") / "dataset.json")
    plans = _settings(plans, args.c, rest)
    adapted = adapt(source, plans, args.c, dataset_json, plans_name)
    out.print(adapted.table.as_table())
    for note in filter(None, (*adapted.notes, replaced(adapted))):
        out.print(f"note: {note}", markup=False)
    output = write_adapted(adapted)
    out.print(*_next_steps(adapted, args.d, output, derived=args.p is None), sep="\n", markup=False)
    return 0


def _settings(plans: dict[str, Any], configuration: str, flags: list[str]) -> dict[str, Any]:
    """The plans with their fine-tuning block: defaults of the backbone, what the plans say already, then the flags."""
    from nnssl_ext.trainers.finetuning.settings import BLOCK, FinetuneSettings, read_settings

    default = read_settings(plans, configuration) if plans else FinetuneSettings()
    chosen = settings_from_flags(default, flags, "nnssl_adapt")
    block = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(chosen).items()}
    plans = {**plans, BLOCK: block}
    read_settings(plans, configuration)  # refuses values out of range
    return plans


def _next_steps(adapted: Adapted, dataset: str, output: Path, derived: bool) -> list[str]:
    """The stock commands that come next, ready to paste."""
    from nnssl_ext.checkpoints.adapt import CHECKPOINT, TABLE

    name, configuration, number = adapted.plans["plans_name"], adapted.configuration, dataset_id(dataset)
    weights = output / CHECKPOINT
    steps = [f"wrote plans {name}, {weights} and {output / TABLE}", "next:"]
    if derived:
        steps.append(f"  nnUNetv2_preprocess -d {number} -plans_name {name} -c {configuration}")
    trainer = "-tr nnsslFinetuneTrainer"
    steps.append(
        f"  nnUNetv2_train {number} {configuration} 0 -p {name} {trainer} -pretrained_weights {shlex.quote(str(weights))}"
    )
    return steps
