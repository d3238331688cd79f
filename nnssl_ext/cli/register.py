"""``nnssl_register``: register scans with the frozen features of any checkpoint."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnssl_ext.cli._console import console
from nnssl_ext.cli._device import device_name
from nnssl_ext.cli._run import USER_ERROR, run
from nnssl_ext.cli._settings import settings_from_flags

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nnssl_ext.registration.batch import PairFiles
    from nnssl_ext.registration.features import FeatureSource
    from nnssl_ext.registration.pipeline import PairSettings

LESS_MEMORY = "lower --features.memory_gib (tiles) and --solver.memory_gib, or give a coarser --spacing; on a GPU, try -device cpu"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="nnssl_register",
        description="Find the displacement that makes a moving scan look like a fixed one, by comparing what a pretrained network "
        "(or MIND, or both) says about them. Any spacing, orientation and field of view; CT, MR, or one with the other.",
        epilog="Every setting is a flag too, e.g. --init affine --features.shifts 2 --solver.sdlogj 0.24; "
        "nnssl_register --settings lists them.",
    )
    p.add_argument("-f", type=Path, metavar="FIXED", help="scan whose grid the results have (NIfTI, NRRD, MHA)")
    p.add_argument("-m", type=Path, metavar="MOVING", help="scan to be warped")
    p.add_argument(
        "--pairs",
        type=Path,
        metavar="CSV",
        help="many pairs instead: columns fixed, moving and as needed name, fixed_mask, moving_mask, fixed_labels, "
        "moving_labels, init; each gets a folder in OUT. Run it again to go on where it stopped",
    )
    p.add_argument(
        "-c",
        metavar="FEATURES",
        help="a checkpoint of nnssl-ext, nnssl or nnU-Net (also hf:OWNER/NAME); mind; intensity; random:PLANS.json, the same network "
        "untrained; or several joined by +. A network may be followed by @ and a level, e.g. last.pth@encoder1+mind; @labels stands "
        "for what the segmentation layer of a fine-tuned network tells",
    )
    p.add_argument("-o", type=Path, metavar="OUT", help="folder for the results")
    p.add_argument("--fixed-mask", type=Path, help="where to look in the fixed scan; on its grid")
    p.add_argument("--moving-mask", type=Path, help="where to look in the moving scan; on its grid")
    p.add_argument("--fixed-labels", type=Path, help="segmentation of the fixed scan, to measure Dice and HD95 only")
    p.add_argument("--moving-labels", type=Path, help="segmentation of the moving scan, to be warped")
    p.add_argument("--inverse", action="store_true", help="also write the field from moving to fixed")
    p.add_argument("--seed", type=int, default=0, help="of random weights (default: 0)")
    p.add_argument("-device", choices=("cuda", "cpu", "mps"), help="default: cuda where there is one, else cpu")
    p.add_argument("--settings", action="store_true", help="list the settings of start, features and solver, and exit")
    return p


def main() -> None:
    """Entry point of ``nnssl_register``."""
    run(_main, LESS_MEMORY)


def _main() -> int:
    base = parser()
    args, rest = base.parse_known_args()
    if args.settings:
        _settings(["--help"])
    single = args.f is not None and args.m is not None
    if args.c is None or args.o is None or single == (args.pairs is not None):
        base.error("-c, -o, and either -f and -m or --pairs are required")
    one = (args.f, args.m, args.fixed_mask, args.moving_mask, args.fixed_labels, args.moving_labels)
    if args.pairs and any(one):
        base.error("with --pairs, scans, masks and labels are columns of the CSV")
    settings = _settings(rest)

    import torch

    from nnssl_ext.checkpoints.source import with_local_files
    from nnssl_ext.registration.affine import check_invertible
    from nnssl_ext.registration.batch import PairFiles, read_pairs, run_batch, sums_of
    from nnssl_ext.registration.features import digests_of, load_features
    from nnssl_ext.registration.outputs import check_folder, check_output

    check_folder(args.o)
    if single:
        pair = PairFiles(*one, init=settings.init)
        check_output(args.o, pair.paths().values())
        if args.inverse:
            check_invertible(settings.init)
        pairs = {}
    else:
        pairs = {name: replace(each, init=each.init or settings.init) for name, each in read_pairs(args.pairs).items()}
    device = torch.device(device_name(args.device))
    features = with_local_files(args.c)
    content = digests_of(features)  # before loading: what changes in between is then registered again next time
    sources = load_features(features, device, settings.features, args.seed)
    out = console()
    for source in sources:
        out.print(f"{source.name}: {source.about}", *source.notes, sep="\n  note: ", markup=False)
    asked = {
        "version": version("nnssl-ext"),
        "features": args.c,
        "files": content,
        "seed": args.seed,
        "inverse": args.inverse,
        "settings": asdict(settings),
    }

    def request(files: PairFiles) -> dict[str, Any]:
        told = {**files.as_json(), "content": sums_of(files.paths()), **asked}
        return json.loads(json.dumps(told))  # as it reads from a file

    def register(files: PairFiles, folder: Path) -> dict[str, Any]:
        return _register(files, folder, sources, settings, device, request(files), args.inverse)

    if single:
        measures = register(pair, args.o)
        out.print(*_summary(measures), f"wrote {args.o}", sep="\n", markup=False)
        return 0
    failures = run_batch(pairs, args.o, request, register, lambda line: out.print(line, markup=False))
    out.print(f"{len(pairs) - len(failures)} of {len(pairs)} pairs are in {args.o}", markup=False)
    return USER_ERROR if failures else 0


def _settings(flags: list[str]) -> PairSettings:
    from nnssl_ext.registration.pipeline import PairSettings

    return settings_from_flags(PairSettings(), flags, "nnssl_register")


def _register(
    files: PairFiles,
    folder: Path,
    sources: Sequence[FeatureSource],
    settings: PairSettings,
    device: Any,
    request: dict[str, Any],
    inverse: bool,
) -> dict[str, Any]:
    """Register one pair into a folder; returns its measures."""
    from nnssl_ext.registration.affine import check_invertible
    from nnssl_ext.registration.images import load_scan
    from nnssl_ext.registration.outputs import check_output, write_outputs
    from nnssl_ext.registration.overview import overview
    from nnssl_ext.registration.pipeline import register_pair
    from nnssl_ext.reports.registration import draw_overview

    check_output(folder, files.paths().values())
    settings = replace(settings, init=files.init or settings.init)
    if inverse:
        check_invertible(settings.init)
    fixed = load_scan(files.fixed, files.fixed_mask, files.fixed_labels)
    moving = load_scan(files.moving, files.moving_mask, files.moving_labels)
    result = register_pair(fixed, moving, sources, settings, device)
    about = [{"name": source.name, "about": source.about} for source in sources]

    def draw(path: Path) -> None:
        draw_overview(path, **overview(result))

    return write_outputs(result, folder, request, inverse, draw, features=about, device=str(device))


def _summary(measures: dict[str, Any]) -> list[str]:
    """What a user wants to know at once."""
    lines = [f"note: {note}" for note in measures["notes"]]
    lines.append(f"start: {measures['start']}")
    smooth, length = measures["smoothness_foreground"], measures["displacement_mm"]
    lines.append(
        f"displacement: mean {length['mean']:.2f} mm, largest {length['max']:.2f} mm; SDlogJ {smooth['sdlogj']:.3f}, "
        f"folds {smooth['fold_percent']:.3f} %"
    )
    if "labels_after" in measures:
        before, after = (measures[f"labels_{when}"]["dice"]["mean"] for when in ("before", "after"))
        if before is not None and after is not None:
            lines.append(f"Dice: {before:.3f} before, {after:.3f} after")
    lines.append(", ".join(f"{stage} {value:.1f} s" for stage, value in measures["seconds"].items()))
    return lines
