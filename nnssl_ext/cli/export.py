"""``nnssl_export``: a checkpoint as a folder for strangers, and onto the Hugging Face hub."""

from __future__ import annotations

import argparse
from pathlib import Path

from nnssl_ext.cli._console import console
from nnssl_ext.cli._run import run


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="nnssl_export",
        description="Write a folder that a stranger can use: the weights as safetensors and as nnU-Net checkpoint, plans, nnssl's "
        "adaptation plan, a model card and SHA-256 sums. Optimiser, case names and paths stay behind.",
    )
    p.add_argument("checkpoint", type=Path, help="of nnssl_train or nnssl_adapt, e.g. checkpoint_final.pth")
    p.add_argument("-o", type=Path, required=True, metavar="FOLDER", help="new, empty, or an earlier export")
    p.add_argument(
        "--license",
        metavar="ID",
        help="of the weights, by the hub's identifiers: apache-2.0, cc-by-sa-4.0, other ...; the licence of the training data "
        "may bind it. Needed for --push (default: unknown)",
    )
    p.add_argument("--push", metavar="OWNER/NAME", help="also put it into this repository of the Hugging Face hub")
    p.add_argument("--private", action="store_true", help="with --push: create the repository as a private one")
    return p


def main() -> None:
    """Entry point of ``nnssl_export``."""
    run(_main)


def _main() -> int:
    base = parser()
    args = base.parse_args()
    if args.push and not args.license:
        base.error("--push publishes, so say under which licence: --license ID")
    if args.private and not args.push:
        base.error("--private belongs to --push")

    from nnssl_ext.checkpoints.export import CARD, FILES, UNKNOWN, export
    from nnssl_ext.checkpoints.hub import push

    out = console()
    export(args.checkpoint, args.o, args.license or UNKNOWN, args.push)
    out.print(
        f"wrote {args.o}: {', '.join(FILES)}", f"read {args.o / CARD} before you share it", sep="\n", markup=False
    )
    if args.push:
        pushed = push(args.o, FILES, args.push, args.private)
        out.print(f"pushed to {pushed}", f"to use it: nnssl_adapt {pushed} -d DATASET", sep="\n", markup=False)
    return 0
