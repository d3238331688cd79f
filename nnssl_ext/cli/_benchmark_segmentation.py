"""``nnssl_benchmark segmentation`` and ``nnssl_benchmark report``: does pretraining help, with how many labels?"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnssl_ext.cli._console import console
from nnssl_ext.cli._device import device_name
from nnssl_ext.cli._run import USER_ERROR
from nnssl_ext.cli._settings import settings_from_flags
from nnssl_ext.errors import NnsslError

if TYPE_CHECKING:
    from nnssl_ext.benchmark.matrix import Benchmark, Cell
    from nnssl_ext.trainers.finetuning.settings import FinetuneSettings

PROGRAM = "nnssl_benchmark segmentation"
VARIED = ("train_cases", "subset_seed", "seed")
EVALUATIONS = 2


def add_parsers(commands: Any) -> None:
    """The flags beside those of `FinetuneSettings`."""
    p = commands.add_parser(
        "segmentation",
        allow_abbrev=False,
        help="Dice of checkpoints and of training from scratch by number of labelled cases, as a page and JSON",
        description="Fine-tune checkpoints and train from scratch with stock nnUNetv2_train: every arm with the same labelled "
        "cases, batches and iterations, judged by the same untouched cases with nnU-Net's own prediction and metrics.",
        epilog="Every cell is kept as a file: the same command goes on where it stopped, and one with other arms, cases, epochs "
        "or seeds adds to what is there. Fine-tuning settings of all cells are flags too, e.g. --iterations_per_epoch 30 --evaluations 3; "
        "nnssl_adapt --settings lists them.",
    )
    p.add_argument(
        "-d", metavar="DATASET", required=True, help="id or name; planned and preprocessed by stock commands"
    )
    p.add_argument("-p", metavar="PLANS", required=True, help="plans whose network is trained, e.g. nnsslPrimusMPlans")
    p.add_argument(
        "-m",
        nargs="+",
        required=True,
        metavar="ARM",
        help="NAME=CHECKPOINT (of nnssl-ext, nnssl, OpenMind; a file, an exported folder or hf:OWNER/NAME@REVISION), "
        "NAME=CHECKPOINT@PLANS for plans of its own, or scratch, which is added anyway for all plans in use",
    )
    p.add_argument("-o", type=Path, metavar="OUT", required=True, help="folder for cells, report.json and report.html")
    p.add_argument(
        "-c", metavar="CONFIG", default="3d_fullres", help="configuration of the plans (default: 3d_fullres)"
    )
    p.add_argument("-f", type=int, default=0, help="fold whose validation cases are tested on (default: 0)")
    p.add_argument("--test", type=Path, metavar="FILE", help="test cases, one per line, instead of a fold's")
    p.add_argument(
        "--train_cases", type=int, nargs="+", default=[1, 2, 5, 20], help="labelled cases (default: 1 2 5 20)"
    )
    p.add_argument("--epochs", type=int, nargs="+", metavar="N", help="lengths of the schedules (default: the plans')")
    p.add_argument("--seeds", type=int, default=3, help="repetitions: other labelled cases and weights (default: 3)")
    p.add_argument("--against", nargs="+", default=[], metavar="ARM", help="arms that all others are compared with too")
    p.add_argument(
        "--side_by_side", type=int, default=1, metavar="N", help="cells at a time; on CUDA a GPU each (default: 1)"
    )
    p.add_argument(
        "--slurm",
        nargs="+",
        metavar="KEY=VALUE",
        help="run cells as SLURM jobs, with submitit's parameters, e.g. slurm_partition=gpu gpus_per_node=1 timeout_min=600",
    )
    p.add_argument(
        "--workers",
        type=int,
        default=0,
        help="processes that augment, per cell (default: 0: the batches are the same for all arms and each time)",
    )
    p.add_argument("--dry-run", action="store_true", help="list the cells, tell how long they take, and stop")
    p.add_argument(
        "-device",
        choices=("cuda", "cpu", "mps"),
        help="default: cuda where there is one, else cpu; with --slurm, as each job finds it",
    )
    r = commands.add_parser(
        "report",
        help="the page and JSON of a segmentation benchmark, finished or not",
        description="Write report.html and report.json from the cells that are there, also while others are running.",
    )
    r.add_argument("output", type=Path, metavar="OUT", help="the -o of nnssl_benchmark segmentation")


def main(args: argparse.Namespace, rest: list[str]) -> int:
    """Run, or go on with, a benchmark."""
    from nnssl_ext.benchmark.execution import Workers, execute, submit
    from nnssl_ext.benchmark.preparation import check_arms, keep_checkpoints, visible_gpus
    from nnssl_ext.benchmark.record import claim, save

    benchmark = _benchmark(args, rest)
    device = device_name(args.device)
    gpus = tuple(visible_gpus()) if device == "cuda" and not args.slurm else ()
    if args.side_by_side < 1 or (gpus and args.side_by_side > len(gpus)):
        raise NnsslError(f"--side_by_side {args.side_by_side}, with {len(gpus)} GPUs", "one cell per GPU at most")
    out = console()

    def say(line: str) -> None:
        out.print(line, markup=False)

    parameters = _parameters(args.slurm or [])
    claim(benchmark, args.o)
    about = check_arms(benchmark)
    benchmark = keep_checkpoints(benchmark, args.o)
    cells = benchmark.cells()
    save(benchmark, cells, args.o, about)
    say(f"{benchmark.dataset}: {len(benchmark.split.test)} test cases, {benchmark.split.about}; {len(cells)} cells")
    for name, arm in about.items():
        for note in arm["notes"]:
            say(f"note: {name}: {note}")
    if args.dry_run:
        return _estimate(benchmark, cells, args, device, gpus, say)
    if args.slurm:
        failures = submit(benchmark, cells, args.o, args.device, parameters, say)
    else:
        workers = Workers(benchmark, args.o, device, gpus)
        try:
            failures = execute(cells, args.o, workers.run, args.side_by_side, say)
        finally:
            workers.stop()
    save(benchmark, cells, args.o, about)  # again: a command for other cells may have written it meanwhile
    _tell(args.o, say)
    return USER_ERROR if failures else 0


def report(args: argparse.Namespace, rest: Sequence[str]) -> int:
    """Write page and JSON of what is there."""
    if rest:
        raise NnsslError(f"unknown flags {' '.join(rest)}", "nnssl_benchmark report takes a folder only")
    out = console()
    _tell(args.output, lambda line: out.print(line, markup=False))
    return 0


def _tell(output: Path, say: Callable[[str], None]) -> None:
    from nnssl_ext.benchmark.report import write_report

    content = write_report(output)
    done = content["cells"]
    for line in (
        f"{done['done']} of {done['all']} cells are done",
        *content["verdicts"],
        *(f"note: {text}" for text in content["warnings"]),
        *(f"failed: {cell}: {why}" for cell, why in content["failures"].items()),
        f"wrote {output / 'report.html'}",
    ):
        say(line)


def _estimate(
    benchmark: Benchmark,
    cells: Sequence[Cell],
    args: argparse.Namespace,
    device: str,
    gpus: tuple[str, ...],
    say: Callable[[str], None],
) -> int:
    from nnssl_ext.benchmark.execution import Workers, execute, pilot, seconds_ahead

    known = _results(benchmark, cells, args.o)
    if {plans for plans, _ in known} < {arm.plans for arm in benchmark.arms}:
        small, folder = pilot(benchmark), args.o / "pilot"
        workers = Workers(small, folder, device, gpus)
        try:
            say("no cell is done yet: timing a few iterations from scratch")
            failures = execute(small.cells(), folder, workers.run, 1, say)
        finally:
            workers.stop()
        if failures:
            raise NnsslError(next(iter(failures.values())), "mend this before the benchmark")
        known += _results(small, small.cells(), folder)
    waiting = [cell for cell in cells if cell.finished(args.o) is None]
    for cell in waiting:
        say(f"open: {cell}, {seconds_ahead(benchmark, [cell], known) / 60:.1f} min")
    hours = seconds_ahead(benchmark, waiting, known) / args.side_by_side / 3600
    say(f"{len(waiting)} of {len(cells)} cells are open: about {hours:.2f} h, {args.side_by_side} at a time")
    return 0


def _results(benchmark: Benchmark, cells: Sequence[Cell], output: Path) -> list[tuple[str, dict[str, Any]]]:
    return [(benchmark.arm(cell.arm).plans, found) for cell in cells if (found := cell.finished(output))]


def _benchmark(args: argparse.Namespace, rest: Sequence[str]) -> Benchmark:
    from nnssl_ext.benchmark.matrix import Benchmark, parse_arms
    from nnssl_ext.benchmark.preparation import find_split
    from nnssl_ext.paths import dataset_name
    from nnssl_ext.plans import preprocessed_folder

    dataset = dataset_name(args.d)
    arms = parse_arms(args.m, args.p)
    if unknown := sorted({*args.against} - {arm.name for arm in arms}):
        raise NnsslError(f"--against {', '.join(unknown)}", f"take part: {', '.join(arm.name for arm in arms)}")
    for name, values in (
        ("--train_cases", args.train_cases),
        ("--epochs", args.epochs or [1]),
        ("--seeds", [args.seeds]),
    ):
        if min(values) < 1:
            raise NnsslError(f"{name} {min(values)}", "give numbers of at least 1")
    settings = {plans: _settings(dataset, plans, args.c, rest) for plans in dict.fromkeys(arm.plans for arm in arms)}
    return Benchmark(
        dataset=dataset,
        preprocessed=preprocessed_folder(dataset),
        configuration=args.c,
        split=find_split(dataset, args.p, args.c, args.f, args.test),
        arms=tuple(arms),
        train_cases=tuple(sorted({*args.train_cases})),
        epochs=tuple(sorted({*(args.epochs or [settings[arms[0].plans].epochs])})),
        seeds=args.seeds,
        settings=settings,
        workers=args.workers,
        against=tuple(args.against),
    )


def _settings(dataset: str, plans_name: str, configuration: str, flags: Sequence[str]) -> FinetuneSettings:
    """The plans' settings with what the flags change."""
    from dataclasses import asdict

    from nnssl_ext.plans import read_plans
    from nnssl_ext.trainers.finetuning.settings import BLOCK, FinetuneSettings, read_settings

    plans = read_plans(dataset, plans_name)
    default = replace(read_settings(plans, configuration), evaluations=EVALUATIONS)
    default = replace(default, **{name: getattr(FinetuneSettings(), name) for name in VARIED})
    chosen = settings_from_flags(default, flags, PROGRAM)
    for name in VARIED:
        if getattr(chosen, name) != getattr(default, name):
            raise NnsslError(f"--{name} is what the matrix varies", "use --train_cases A B ... and --seeds N")
    block = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(chosen).items()}
    read_settings({**plans, BLOCK: block}, configuration)  # refuses values out of range
    return chosen


def _parameters(texts: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise NnsslError(f"--slurm {text}", "write KEY=VALUE, e.g. slurm_partition=gpu")
        found[name] = int(value) if value.isdigit() else value
    return found
