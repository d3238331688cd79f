"""``nnssl_benchmark``: measure."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnssl_ext.catalogue import pretraining_methods
from nnssl_ext.cli import _benchmark_registration, _benchmark_segmentation, register
from nnssl_ext.cli._device import device_name
from nnssl_ext.cli._run import LESS_MEMORY, run
from nnssl_ext.cli._settings import settings_from_flags
from nnssl_ext.errors import NnsslError

if TYPE_CHECKING:
    from nnssl_ext.engine.job import Job


def parser(synthetic: bool = False) -> argparse.ArgumentParser:
    """The flags beside the method's. With made-up data there are no positional ones: argparse would take the values of the
    method's flags for them."""
    p = argparse.ArgumentParser(prog="nnssl_benchmark", description="Measure what a machine or a method can do.")
    commands = p.add_subparsers(dest="command", required=True)
    t = commands.add_parser(
        "throughput",
        help="seconds for reading, views, forward, backward and step, and peak memory, as JSON",
        description="Seconds for reading, views (crop, flip, rotation, zoom, intensity), forward, backward, optimiser and "
        "the whole step of a pretraining job, and peak memory, as JSON.",
        epilog="Without a dataset: nnssl_benchmark throughput --synthetic PrimusTiny --crop 40 56 40. Every setting of the "
        "method is a flag too, as for nnssl_train: -tr DINO3DTrainer --crops.local_views 8",
    )
    t.set_defaults(dataset=None, configuration=None)
    if not synthetic:
        t.add_argument("dataset", nargs="?", help="preprocessed dataset, id or name")
        t.add_argument("configuration", nargs="?", help="3D configuration of the plans, e.g. 3d_fullres")
    t.add_argument(
        "-tr", default="MAETrainer", help=f"method: {', '.join(pretraining_methods())} (default: MAETrainer)"
    )
    t.add_argument("-p", default="nnsslPrimusMPlans", help="plans name (default: nnsslPrimusMPlans)")
    t.add_argument("--synthetic", metavar="PRESET", help="made-up data and this backbone instead of a dataset")
    t.add_argument("--crop", type=int, nargs=3, metavar=("Z", "Y", "X"), help="voxels, with --synthetic")
    t.add_argument("--batch_size", type=int, help="cases per step (default: the plans'; 2 with --synthetic)")
    t.add_argument("-device", choices=("cuda", "cpu", "mps"), help="default: cuda where there is one, else cpu")
    t.add_argument("--precision", choices=("bf16", "32"), help="default: bf16 on cuda, else 32")
    t.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    t.add_argument("--repeats", type=int, default=5, help="measurements per figure, after a warm-up (default: 5)")
    t.add_argument("--data_only", action="store_true", help="reading and views only, no network")
    t.add_argument(
        "--all_tokens", action="store_true", help="also the same step with all tokens encoded, and the ratio"
    )
    t.add_argument("-o", type=Path, metavar="FILE", help="write the JSON here instead of printing it")
    _benchmark_registration.add_parser(commands)
    _benchmark_segmentation.add_parsers(commands)
    return p


def main() -> None:
    """Entry point of ``nnssl_benchmark``."""
    run(_main, register.LESS_MEMORY if "registration" in sys.argv[1:2] else LESS_MEMORY)


def _main() -> int:
    base = parser(synthetic="--synthetic" in sys.argv)
    args, rest = base.parse_known_args()
    if args.command == "registration":
        return _benchmark_registration.main(args, rest)
    if args.command == "segmentation":
        return _benchmark_segmentation.main(args, rest)
    if args.command == "report":
        return _benchmark_segmentation.report(args, rest)
    if args.synthetic and not args.crop:
        base.error("--synthetic needs --crop Z Y X")
    if not args.synthetic and not (args.dataset and args.configuration):
        base.error("name DATASET and CONFIGURATION, or use --synthetic PRESET --crop Z Y X")
    if args.repeats < 1:
        raise NnsslError(f"--repeats {args.repeats}", "measure at least once")
    with tempfile.TemporaryDirectory() as folder:
        result = _throughput(args, rest, Path(folder))
    if args.o:
        from nnssl_ext.files import write_json

        write_json(args.o, result)
    else:
        print(json.dumps(result, indent=2))
    return 0


def _throughput(args: argparse.Namespace, rest: list[str], folder: Path) -> dict[str, Any]:
    import torch

    from nnssl_ext.reports.machine import machine
    from nnssl_ext.reports.throughput import measure_data, measure_steps, measure_visible_against_all

    if args.threads:
        torch.set_num_threads(args.threads)
    job = _job(args, folder)
    job = replace(job, settings=settings_from_flags(job.settings, rest, f"nnssl_benchmark throughput -tr {args.tr}"))
    device = torch.device(job.run.device)
    result: dict[str, Any] = {
        "machine": machine(device),
        "data": measure_data(job.cases, job.plan.global_crop, device, args.repeats),
    }
    if not args.data_only:
        result["training"] = measure_steps(job, args.repeats)
    if args.all_tokens:
        result["visible_tokens_against_all"] = measure_visible_against_all(job, args.repeats)
    return result


def _job(args: argparse.Namespace, folder: Path) -> Job:
    from nnssl_ext.catalogue import load_method
    from nnssl_ext.data.cases import list_cases
    from nnssl_ext.engine.job import Job, data_folder, plan_of
    from nnssl_ext.engine.settings import RunSettings

    device = device_name(args.device)
    precision: Any = args.precision or ("bf16" if device == "cuda" else "32")
    if args.synthetic:
        from nnssl_ext.reports.synthetic import synthetic_job

        settings = RunSettings(batch_size=args.batch_size or 2, device=device, precision=precision)
        return synthetic_job(args.synthetic, tuple(args.crop), args.tr, settings, folder)
    from nnssl_ext.paths import dataset_name

    dataset = dataset_name(args.dataset)
    plans, plan = plan_of(dataset, args.p, args.configuration)
    return Job(
        method=args.tr,
        settings=load_method(args.tr).settings_type.for_plan(plan),
        run=RunSettings(batch_size=args.batch_size or plan.batch_size, device=device, precision=precision),
        dataset=dataset,
        plans=plans,
        plan=plan,
        cases=tuple(list_cases(data_folder(dataset, plans, args.configuration), plan.spacing)),
        output=folder,
    )
