"""``nnssl_train``: pretrain on an nnU-Net-preprocessed dataset."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnssl_ext.catalogue import load_method, pretraining_methods
from nnssl_ext.cli._device import device_name
from nnssl_ext.cli._run import run
from nnssl_ext.cli._settings import settings_from_flags
from nnssl_ext.errors import NnsslError
from nnssl_ext.files import read_json

if TYPE_CHECKING:
    from nnssl_ext.engine.job import Job


def parser() -> argparse.ArgumentParser:
    """The flags that every method shares, in nnU-Net's spelling."""
    p = argparse.ArgumentParser(
        prog="nnssl_train",
        description="Pretrain a backbone on an nnU-Net-preprocessed dataset, labelled or not.",
        epilog="Every setting of the method is a flag too: nnssl_train -tr MAETrainer -h lists them.",
        add_help=False,
    )
    p.add_argument("dataset", nargs="?", help="dataset id or name, e.g. 4 or Dataset004_Hippocampus")
    p.add_argument("configuration", nargs="?", help="3D configuration of the plans, e.g. 3d_fullres")
    p.add_argument(
        "-tr", default="MAETrainer", help=f"method: {', '.join(pretraining_methods())} (default: MAETrainer)"
    )
    p.add_argument("-p", default="nnsslPrimusMPlans", help="plans name (default: nnsslPrimusMPlans)")
    p.add_argument("-device", choices=("cuda", "cpu", "mps"), help="default: cuda where there is one, else cpu")
    p.add_argument("-num_gpus", type=int, default=1, help="processes on this computer, one per GPU (default: 1)")
    p.add_argument("--c", action="store_true", help="continue the run in the results folder; start it if there is none")
    p.add_argument(
        "-pretrained_weights",
        type=Path,
        metavar="CHECKPOINT",
        help="start from the weights of this pretraining run (also hf:OWNER/NAME) or model of nnUNetv2_train, with schedules of "
        "its own: larger crops and smaller tokens are adapted to; checkpoint_latest.pth also gives heads and mask token",
    )
    p.add_argument("--name", help="run of its own beside others with the same method and plans: ends its folder's name")
    p.add_argument("--batch_size", type=int, help="cases per step and process (default: the plans')")
    p.add_argument("--seed", type=int, default=0, help="initial weights, batches, views and masks (default: 0)")
    p.add_argument("--cases", type=Path, help="JSON list, or text file with one case a line: learn from these only")
    p.add_argument("--precision", choices=("bf16", "32"), help="default: bf16 on cuda, else 32")
    p.add_argument("--workers", type=int, help="reading processes per training process (default: by CPU count)")
    p.add_argument("--compile", action="store_true", help="run the step through torch.compile")
    p.add_argument(
        "--picture_epochs",
        type=int,
        default=10,
        help="draw pictures every so many epochs; 0 = only at the end (default: 10)",
    )
    p.add_argument(
        "--probe_epochs",
        type=int,
        default=10,
        help="where the dataset has labels, ask every so many epochs what a linear and a kNN classifier make of frozen "
        "features; 0 = never (default: 10). Labels never reach the training",
    )
    p.add_argument(
        "--registration_pairs",
        type=int,
        default=0,
        metavar="N",
        help="whenever features are probed, also register N labelled pairs by them and report Dice at one smoothness, "
        "beside random weights (default: 0)",
    )
    p.add_argument(
        "--registration_cases",
        type=Path,
        metavar="FILE",
        help="JSON list, or text file with one case a line: neighbours among these development cases are the pairs. Keep test "
        "cases out (default: the cases that are learned from)",
    )
    p.add_argument(
        "--max_skipped", type=int, default=5, help="non-finite steps tolerated between checkpoints (default: 5)"
    )
    p.add_argument("--tracker", choices=("none", "tensorboard", "wandb"), default="none", help="optional extras")
    p.add_argument("-h", "--help", action="store_true", help="this help, and the settings of the method given by -tr")
    return p


def main() -> None:
    """Entry point of ``nnssl_train``."""
    run(_main)


def _main() -> int:
    base = parser()
    args, rest = base.parse_known_args()
    if args.help:
        base.print_help()
        if "-tr" in sys.argv:
            default, meant = _default_settings(args)
            print(f"\nsettings of {args.tr}, with the defaults {meant}:\n")
            settings_from_flags(default, ["-h"], f"nnssl_train -tr {args.tr}")
        return 0
    if not args.dataset or not args.configuration:
        base.error(
            "DATASET and CONFIGURATION are required and come first, before any flag, "
            "e.g. nnssl_train 4 3d_fullres -p nnsslPrimusTinyPlans"
        )
    job = _job(args, rest)

    from nnssl_ext.engine.loop import pretrain

    pretrain(job, resume=args.c)
    return 0


def _default_settings(args: argparse.Namespace) -> tuple[Any, str]:
    """A method's settings before any flag, and what they are meant for: they follow the plans where a job is named."""
    settings = load_method(args.tr).settings_type
    if not args.dataset or not args.configuration:
        return settings(), "of the full presets; those of your plans: name DATASET, CONFIGURATION and -p too"
    from nnssl_ext.engine.job import plan_of

    _, plan = plan_of(args.dataset, args.p, args.configuration)
    return settings.for_plan(replace(plan, batch_size=args.batch_size or plan.batch_size)), f"of {args.p}"


def _job(args: argparse.Namespace, rest: list[str]) -> Job:
    from nnssl_ext.checkpoints.source import recorded
    from nnssl_ext.data.cases import list_cases
    from nnssl_ext.engine.job import Job, data_folder, plan_of, run_folder
    from nnssl_ext.engine.settings import RunSettings
    from nnssl_ext.paths import dataset_name

    if args.num_gpus < 1:
        raise NnsslError(f"-num_gpus {args.num_gpus}", "give at least 1; one process serves a CPU too")
    method = load_method(args.tr)
    dataset = dataset_name(args.dataset)
    plans, plan = plan_of(dataset, args.p, args.configuration)
    batch_size = plan.batch_size if args.batch_size is None else args.batch_size
    defaults = method.settings_type.for_plan(replace(plan, batch_size=batch_size))
    settings = settings_from_flags(defaults, rest, f"nnssl_train -tr {args.tr}")
    device = device_name(args.device)
    only = _case_names(args.cases) if args.cases else None
    return Job(
        method=args.tr,
        settings=settings,
        run=RunSettings(
            batch_size=batch_size,
            seed=args.seed,
            device=device,
            processes=args.num_gpus,
            precision=args.precision or ("bf16" if device == "cuda" else "32"),
            workers=_default_workers(args.num_gpus) if args.workers is None else args.workers,
            compile=args.compile,
            max_skipped=args.max_skipped,
            picture_epochs=args.picture_epochs,
            probe_epochs=args.probe_epochs,
            registration_pairs=args.registration_pairs,
            registration_cases=tuple(_case_names(args.registration_cases) if args.registration_cases else ()),
            pretrained_weights=recorded(args.pretrained_weights) if args.pretrained_weights else None,
            tracker=args.tracker,
        ),
        dataset=dataset,
        plans=plans,
        plan=plan,
        cases=tuple(list_cases(data_folder(dataset, plans, args.configuration), plan.spacing, only)),
        output=run_folder(dataset, args.tr, plan, args.name),
    )


def _case_names(path: Path) -> list[str]:
    """The cases that a file of ``--cases`` or ``--registration_cases`` lists."""
    if path.suffix == ".json":
        names = read_json(path)
        if not isinstance(names, list):
            raise NnsslError(f"the case list {path} is not a JSON list", 'write ["case_a", "case_b"]')
        return [str(name) for name in names]
    try:
        return [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise NnsslError(
            f"cannot read the case list {path}: {error}", "give a JSON list or a text file with one case a line"
        ) from error


def _default_workers(processes: int) -> int:
    """Half of the free cores per process, at most 8; none on small machines, where reading in-process is faster."""
    return min(8, max(0, (os.cpu_count() or 1) // processes - 2) // 2)
