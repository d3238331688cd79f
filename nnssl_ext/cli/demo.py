"""``nnssl_demo``: the main job end to end, with one HTML page as its outcome."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from nnssl_ext.cli._run import run
from nnssl_ext.demo.settings import PLANNERS, DemoSettings


def main() -> None:
    """Entry point of the command."""
    run(_main)


def _main() -> None:
    args = _parser().parse_args()

    from rich.console import Console

    from nnssl_ext.demo.main_job import run_demo

    settings = DemoSettings(
        output=args.output.absolute(),
        data=args.data and args.data.absolute(),
        backbones=tuple(PLANNERS) if args.backbone == "both" else (args.backbone,),
        modality=args.modality,
        cases=args.cases,
        labelled=args.labelled,
        pretrain_steps=args.pretrain_steps,
        finetune_steps=args.finetune_steps,
        device=args.device,
        side_by_side=args.jobs,
    )
    signal.signal(signal.SIGTERM, _terminated)
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"all files and logs go to {settings.output}", markup=False)
    console.print(f"open {run_demo(settings, console)}", markup=False)


def _terminated(*_: object) -> NoReturn:
    """Leave by an exception, so that the commands under way are ended too."""
    print("stopped; the same command continues", file=sys.stderr)
    sys.exit(128 + signal.SIGTERM)


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="nnssl_demo",
        description="Convert, plan and preprocess, pretrain with MAE, fine-tune from the checkpoint and from scratch, predict, and "
        "report the Dice of both arms: every step with the command you would type. Some minutes on two CPU cores. Run it "
        "again to continue; what is done is kept.",
    )
    p.add_argument("--data", type=Path, metavar="DIR", help="a Medical Segmentation Decathlon task (default: phantoms)")
    p.add_argument(
        "-o", dest="output", type=Path, metavar="DIR", default=Path("nnssl_demo_results"), help="(./%(default)s)"
    )
    p.add_argument("--backbone", choices=("both", *PLANNERS), default="both", help="(%(default)s)")
    p.add_argument("--modality", choices=("mr", "ct"), default="mr", help="of the phantoms (%(default)s)")
    p.add_argument(
        "--cases",
        type=_at_least(13),
        default=DemoSettings.cases,
        metavar="N",
        help="cases used, 8 of them held out (%(default)s)",
    )
    p.add_argument(
        "--labelled",
        type=_at_least(1),
        default=DemoSettings.labelled,
        metavar="N",
        help="labelled cases to fine-tune on (%(default)s)",
    )
    p.add_argument(
        "--pretrain-steps", type=_at_least(10), default=DemoSettings.pretrain_steps, metavar="N", help="(%(default)s)"
    )
    p.add_argument(
        "--finetune-steps",
        type=_at_least(10),
        default=DemoSettings.finetune_steps,
        metavar="N",
        help="of each arm (%(default)s)",
    )
    p.add_argument(
        "--jobs", type=_at_least(1), default=min(2, os.cpu_count() or 1), help="backbones at a time (%(default)s)"
    )
    p.add_argument("-device", choices=("cpu", "cuda", "mps"), default="cpu", help="(%(default)s)")
    return p


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        return value

    return number
