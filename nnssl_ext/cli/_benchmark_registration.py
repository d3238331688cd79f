"""``nnssl_benchmark registration``: methods of registration on labelled pairs, at matched smoothness."""

from __future__ import annotations

import argparse
import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnssl_ext.cli._console import console
from nnssl_ext.cli._device import device_name
from nnssl_ext.cli._run import USER_ERROR
from nnssl_ext.cli._settings import settings_from_flags
from nnssl_ext.errors import NnsslError

if TYPE_CHECKING:
    from nnssl_ext.registration.benchmark.matrix import Benchmark
    from nnssl_ext.registration.benchmark.methods import Method
    from nnssl_ext.registration.benchmark.pairs import Split
    from nnssl_ext.registration.pipeline import PairSettings

PROGRAM = "nnssl_benchmark registration"
METHODS = "none, rigid, affine, demons, syn (ANTs), convexadam (that package), convexadam-ours"


def add_parser(commands: Any) -> None:
    """The flags beside those of `PairSettings`."""
    p = commands.add_parser(
        "registration",
        help="Dice, HD95, landmark error and smoothness of registration methods on labelled pairs, as a page and JSON",
        description="Register labelled pairs with features of any networks, their random-weight controls, MIND and classical "
        "methods; choose every method's settings on development pairs at one smoothness; report on test pairs.",
        epilog="Every registration is kept as a file: the same command goes on where it stopped, and several may share OUT for "
        "different methods. Settings for all methods are flags as for nnssl_register: --init affine --solver.iterations 80",
    )
    p.add_argument(
        "-d",
        metavar="DATASET",
        required=True,
        help="labelled nnU-Net raw dataset (id, name, folder), or a Learn2Reg JSON",
    )
    p.add_argument(
        "-m",
        nargs="+",
        required=True,
        metavar="METHOD",
        help=f"features as nnssl_register takes them, or {METHODS}; NAME=METHOD gives the row a name",
    )
    p.add_argument("-o", type=Path, metavar="OUT", required=True, help="folder for cells, report.json and report.html")
    p.add_argument(
        "--vary",
        nargs="+",
        default=[],
        metavar="SETTING=A,B",
        help="settings to choose from on development pairs, e.g. features.zoom=1,2 weights=1:1,1:2; combined if several. "
        "Regularisation is always chosen",
    )
    p.add_argument(
        "--sdlogj", type=float, help="SDlogJ at which methods are compared (default: 0.24, MIND with λ 1.25)"
    )
    p.add_argument("--development", type=int, default=16, help="development cases (Learn2Reg: pairs; default: 16)")
    p.add_argument("--test", type=int, default=30, help="test cases (Learn2Reg: pairs; default: 30)")
    p.add_argument("--seed", type=int, default=0, help="of the split into cases (default: 0)")
    p.add_argument("--last", action="store_true", help="no draw: the last cases by name are for testing")
    p.add_argument(
        "--controls", type=int, default=3, help="random networks beside every trained one (default: 3; 0: none)"
    )
    p.add_argument(
        "--against", nargs="+", metavar="NAME", help="rows that all others are compared with (default: mind)"
    )
    p.add_argument(
        "--dry-run", action="store_true", help="time one pair per method, tell how long the rest takes, and stop"
    )
    p.add_argument("-device", choices=("cuda", "cpu", "mps"), help="default: cuda where there is one, else cpu")


def main(args: argparse.Namespace, rest: list[str]) -> int:
    """Run, or go on with, a benchmark."""
    import torch

    from nnssl_ext.registration.benchmark.matrix import Benchmark
    from nnssl_ext.registration.benchmark.methods import load, parse_methods, untrained_identity, with_controls
    from nnssl_ext.registration.outputs import check_folder
    from nnssl_ext.registration.solver import SDLOGJ

    check_folder(args.o)
    base = _settings(rest)
    methods = with_controls(parse_methods(args.m), args.controls, untrained_identity)
    against = args.against or [method.name for method in methods if method.features == "mind"]
    if unknown := sorted(set(against) - {method.name for method in methods}):
        raise NnsslError(
            f"--against {', '.join(unknown)}", f"take part: {', '.join(method.name for method in methods)}"
        )
    target = SDLOGJ if args.sdlogj is None else args.sdlogj
    if target <= 0:
        raise NnsslError(f"--sdlogj {target}", "give a standard deviation above 0, such as 0.24")
    device = torch.device(device_name(args.device))
    for method in methods:
        load(method, base, method.seeds[0], device)  # what is missing is named now, not in an hour
    plan = Benchmark(
        split=_split(args),
        methods=tuple(methods),
        variants={method.name: _variants(method, base, rest, args.vary) for method in methods},
        sdlogj=target,
        output=args.o,
        device=device,
    )
    out = console()

    def say(line: str) -> None:
        out.print(line, markup=False)

    say(plan.split.about)
    return _estimate(plan, say) if args.dry_run else _run(plan, against, say)


def _run(plan: Benchmark, against: Sequence[str], say: Any) -> int:
    from nnssl_ext.files import write_json
    from nnssl_ext.registration.benchmark.matrix import by_pair, choose, development_cells, execute, test_cells
    from nnssl_ext.registration.benchmark.summary import summarise
    from nnssl_ext.reports.machine import machine
    from nnssl_ext.reports.registration_benchmark import write_benchmark_page

    choices, tables = {}, {}
    failures: dict[str, str] = {}
    for method in plan.methods:
        results, failed = execute(plan, development_cells(plan, method), say)
        failures |= {str(cell): why for cell, why in failed.items()}
        try:
            choice = choose(plan, method, results)
        except NnsslError as error:
            failures[method.name] = str(error)
            continue
        results, failed = execute(plan, test_cells(plan, method, choice), say)
        failures |= {str(cell): why for cell, why in failed.items()}
        choices[method.name], tables[method.name] = choice, by_pair(method, results)
    content = json.loads(json.dumps(summarise(plan, choices, tables, against, failures, machine(plan.device))))
    write_json(plan.output / "report.json", content)
    write_benchmark_page(content, plan.output / "report.html")
    for line in (*_rows(content), *content["verdicts"], *content["warnings"], f"wrote {plan.output / 'report.html'}"):
        say(line)
    return USER_ERROR if failures else 0


def _estimate(plan: Benchmark, say: Any) -> int:
    from nnssl_ext.registration.benchmark.matrix import outlook

    total = 0.0
    for method in plan.methods:
        cells, seconds = outlook(plan, method, say)
        say(f"{method.name}: {cells} cells open, {seconds / 60:.1f} min")
        total += seconds
    say(f"about {total / 3600:.2f} h on this machine as busy as it is now, one after the other")
    return 0


def _rows(content: dict[str, Any]) -> list[str]:
    found = []
    for each in content["methods"]:
        figures = [
            f"{name} {each['test'][name]['mean']:.3f}"
            for name in ("dice", "hd95_mm", "tre_mm", "sdlogj", "fold_percent")
            if name in each["test"] and each["test"][name]["n"]
        ]
        found.append(f"{each['name']}: {', '.join(figures)}, n = {len(each['test_pairs'])}")
    return found


def _split(args: argparse.Namespace) -> Split:
    from nnssl_ext.paths import dataset_name, folder
    from nnssl_ext.registration.benchmark.pairs import dataset_pairs, learn2reg_pairs

    given = Path(args.d)
    if given.suffix == ".json":
        return learn2reg_pairs(given, args.development, args.test)
    if not (given.is_dir() and os.sep in args.d):
        given = folder("nnUNet_raw") / dataset_name(args.d, "nnUNet_raw")
    return dataset_pairs(given, args.development, args.test, None if args.last else args.seed)


def _settings(flags: Sequence[str]) -> PairSettings:
    from nnssl_ext.registration.pipeline import PairSettings

    return settings_from_flags(PairSettings(), flags, PROGRAM)


def _variants(method: Method, base: PairSettings, flags: Sequence[str], vary: Sequence[str]) -> dict[str, PairSettings]:
    """Label -> settings to try for a method; what does not concern it is left alone."""
    axes = []
    for text in vary:
        name, equals, values = text.partition("=")
        if not equals or not values:
            raise NnsslError(f"--vary {text}", "write SETTING=VALUE,VALUE, e.g. features.zoom=1,2")
        chosen = [value for value in values.replace(":", " ").split(",") if _concerns(name, value, method)]
        if chosen:
            axes.append([(name, value) for value in chosen])
    found = {}
    for combination in itertools.product(*axes):
        label = ", ".join(f"{name}={value}" for name, value in combination)
        changed = [part for name, value in combination for part in (f"--{name}", *value.split())]
        settings = _settings([*flags, *changed]) if changed else base
        fits = settings.weights is None or len(settings.weights) == len(method.parts)
        found[label or "as asked"] = settings if fits else replace(settings, weights=None)
    return found


def _concerns(setting: str, value: str, method: Method) -> bool:
    if method.is_classical:
        return False
    if setting.startswith("features."):
        return bool(method.files)
    return len(value.split()) == len(method.parts) > 1 if setting == "weights" else True
