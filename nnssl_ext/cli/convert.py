"""nnssl_convert: scans of any usual origin -> a nnU-Net raw dataset."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from nnssl_ext.cli._run import run

if TYPE_CHECKING:
    from nnssl_ext.dataset_conversion.cases import PlannedDataset
    from nnssl_ext.dataset_conversion.raw_dataset import Converted


def main() -> None:
    """Entry point of the command."""
    run(_main)


def _main() -> None:
    arguments = _parser().parse_args()
    arguments.run(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "nnssl_convert",
        description="Convert scans into a nnU-Net raw dataset below $nnUNet_raw, with their labels or, without any, with "
        "label-free foreground masks. Bad input is named with reason and remedy; nothing half-written stays.",
    )
    sources = parser.add_subparsers(required=True, metavar="SOURCE")
    for name, add_flags, work, text in (
        ("msd", _msd_flags, _msd, "a Medical Segmentation Decathlon task"),
        ("folder", _folder_flags, _folder, "any folder of NIfTI, NRRD, MHA files or DICOM series"),
        ("bids", _bids_flags, _bids, "a BIDS tree"),
        ("nnssl", _nnssl_flags, _nnssl, "nnssl's pretrain_data.json"),
        ("export-nnssl", _export_flags, _export, "write nnssl's pretrain_data.json for a raw dataset"),
        ("foreground", _foreground_flags, _foreground, "add foreground masks to an image-only raw dataset, in place"),
        ("patches", _patches_flags, _patches, "cut crops that hold foreground out of a raw dataset"),
    ):
        sub = sources.add_parser(name, help=text, description=text)
        add_flags(sub)
        sub.set_defaults(run=work)
    return parser


def _msd_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("path", type=Path, help="the task folder")
    _new_dataset(p, named=False)
    _channels(p)
    _work(p)


def _msd(a: argparse.Namespace) -> None:
    from nnssl_ext.dataset_conversion.msd import plan_msd

    name, planned = plan_msd(a.path, tuple(a.channels) or None)
    _convert(a, a.name or name, planned)


def _folder_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("path", type=Path, help="the folder, searched at any depth")
    _new_dataset(p)
    _channels(p)
    p.add_argument("--labels", type=Path, metavar="DIR", help="folder with a label per case, named as the case")
    p.add_argument(
        "--label-suffix", default="", metavar="TEXT", help="what label names have after the case's, e.g. _seg"
    )
    p.add_argument("--label-names", nargs="+", default=[], metavar="NAME", help="names of the values 0, 1, 2, ...")
    p.add_argument(
        "--channel-suffixes",
        nargs="+",
        default=[],
        metavar="TEXT",
        help='endings that tell the channels of a case apart, e.g. _t1 _t2 (by default _0000 _0001 ... if all names have them; "": none)',
    )
    p.add_argument(
        "--names", choices=("file", "path"), default="file", help="name cases by file, or by folders and file"
    )
    _work(p)


def _folder(a: argparse.Namespace) -> None:
    from nnssl_ext.dataset_conversion.folder import plan_folder

    planned = plan_folder(
        a.path,
        channels=a.channels,
        channel_suffixes=a.channel_suffixes,
        labels=a.labels,
        label_suffix=a.label_suffix,
        label_names=a.label_names,
        names=a.names,
    )
    _convert(a, a.name, planned)


def _bids_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("path", type=Path, help="the folder that holds sub-*")
    _new_dataset(p)
    _channels(p)
    p.add_argument("--suffixes", nargs="+", default=[], metavar="SUFFIX", help="which images, e.g. T1w (all)")
    p.add_argument("--together", action="store_true", help="the suffixes are the channels of one case per session")
    _work(p)


def _bids(a: argparse.Namespace) -> None:
    from nnssl_ext.dataset_conversion.bids import plan_bids

    _convert(a, a.name, plan_bids(a.path, suffixes=a.suffixes, together=a.together, channels=a.channels))


def _nnssl_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("path", type=Path, help="the file or its folder")
    _new_dataset(p, named=False)
    _channels(p)
    p.add_argument("--modalities", nargs="+", default=[], metavar="NAME", help="which images, e.g. T1w (all)")
    _work(p)


def _nnssl(a: argparse.Namespace) -> None:
    from nnssl_ext.dataset_conversion.nnssl_collection import plan_collection

    name, planned = plan_collection(a.path, modalities=a.modalities, channels=a.channels)
    _convert(a, a.name or name, planned)


def _patches_flags(p: argparse.ArgumentParser) -> None:
    _existing_dataset(p)
    p.add_argument("-o", dest="output", required=True, type=int, metavar="ID", help="id of the new dataset")
    p.add_argument("--name", help="name of the new dataset (by default the source's + Patches)")
    p.add_argument("--count", type=_positive, default=4, metavar="N", help="crops per case (4)")
    size = p.add_mutually_exclusive_group(required=True)
    size.add_argument("--size", nargs=3, type=_positive, metavar=("Z", "Y", "X"), help="of a crop, in voxels")
    size.add_argument("--size-mm", nargs=3, type=float, metavar=("Z", "Y", "X"), help="of a crop, in mm")
    p.add_argument(
        "--min-foreground", type=float, default=0.7, metavar="SHARE", help="foreground share of a crop (0.7)"
    )
    p.add_argument(
        "--policy",
        choices=("strict", "best-effort", "skip"),
        default="best-effort",
        help="where no crop reaches the share: call the case bad, take the best crop seen, or leave the crop out",
    )
    p.add_argument(
        "--around",
        choices=("body", "lungs"),
        default="body",
        help="what crops must hold: the patient, or the aerated lungs of a chest CT (body)",
    )
    p.add_argument("--attempts", type=_positive, default=50, metavar="N", help="draws per crop (50)")
    p.add_argument("--per-subject", type=_positive, metavar="N", help="crops per subject at most")
    _subjects(p)
    p.add_argument("--seed", type=int, default=0)
    _work(p)


def _patches(a: argparse.Namespace) -> None:
    from nnssl_ext.dataset_conversion.patches import PatchSettings, plan_patches

    settings = PatchSettings(
        count=a.count,
        size=tuple(a.size or a.size_mm),
        unit="voxels" if a.size else "mm",
        min_foreground=a.min_foreground,
        policy=a.policy,
        attempts=a.attempts,
        per_subject=a.per_subject,
        subject_pattern=a.subject_pattern,
        seed=a.seed,
        around=a.around,
    )
    source = _existing(a.dataset)
    planned = plan_patches(source, settings, limit=a.limit, processes=a.processes)
    a.dataset, a.limit = a.output, None
    _convert(a, a.name or f"{source.name.partition('_')[2]}Patches", planned)


def _foreground_flags(p: argparse.ArgumentParser) -> None:
    _existing_dataset(p)
    _channels(p)
    _work(p)


def _foreground(a: argparse.Namespace) -> None:
    from nnssl_ext.dataset_conversion.foreground import add_foreground

    dataset = _existing(a.dataset)
    done = add_foreground(
        dataset,
        channels=a.channels,
        dry_run=a.dry_run,
        limit=a.limit,
        skip_bad=a.skip_bad,
        processes=a.processes,
    )
    _report(a, dataset, done, "foreground masks of {} cases in {}/labelsTr")


def _export_flags(p: argparse.ArgumentParser) -> None:
    _existing_dataset(p)
    p.add_argument("--dry-run", action="store_true", help="write nothing")
    p.add_argument("-o", dest="output", type=Path, metavar="FILE", help="by default pretrain_data.json in the dataset")
    _subjects(p)


def _export(a: argparse.Namespace) -> None:
    from nnssl_ext.dataset_conversion.nnssl_collection import LISTING, export_collection
    from nnssl_ext.files import write_json

    dataset = _existing(a.dataset)
    content = export_collection(dataset, subject_pattern=a.subject_pattern)
    target = a.output or dataset / LISTING
    subjects = sum(len(inner["subjects"]) for inner in content["datasets"].values())
    if a.dry_run:
        print(f"would write {target}: {subjects} subject(s)")
    else:
        write_json(target, content)
        print(f"wrote {target}: {subjects} subject(s)")


def _new_dataset(p: argparse.ArgumentParser, named: bool = True) -> None:
    p.add_argument("-d", dest="dataset", required=True, type=int, metavar="ID", help="id of the new dataset")
    default = "" if named else " (by default the source's)"
    p.add_argument("--name", required=named, help=f"name of the new dataset{default}")


def _existing_dataset(p: argparse.ArgumentParser) -> None:
    p.add_argument("-d", dest="dataset", required=True, metavar="ID", help="id or name of the dataset")


def _channels(p: argparse.ArgumentParser) -> None:
    help_ = "channel names; CT means Hounsfield units, others z-scores"
    p.add_argument("--channels", nargs="+", default=[], metavar="NAME", help=help_)


def _subjects(p: argparse.ArgumentParser) -> None:
    help_ = "its match in a case's name is the subject"
    p.add_argument("--subject-pattern", default=".+", metavar="REGEX", help=help_)


def _work(p: argparse.ArgumentParser) -> None:
    p.add_argument("--dry-run", action="store_true", help="check everything, print the table, write nothing")
    p.add_argument("--limit", type=_positive, metavar="N", help="the first N cases only")
    p.add_argument("--skip-bad", action="store_true", help="leave bad cases out and convert the rest")
    workers = min(4, os.cpu_count() or 1)
    p.add_argument("-np", dest="processes", type=_positive, default=workers, metavar="N", help="worker processes")


def _existing(number: str) -> Path:
    from nnssl_ext.paths import dataset_name, folder

    return folder("nnUNet_raw") / dataset_name(number, "nnUNet_raw")


def _convert(a: argparse.Namespace, name: str, planned: PlannedDataset) -> None:
    from nnssl_ext.dataset_conversion.dataset_ids import new_dataset
    from nnssl_ext.dataset_conversion.raw_dataset import convert

    target = new_dataset(a.dataset, name)
    if a.limit:
        planned = planned.first(a.limit)
    for note in planned.notes:
        print(f"note: {note}", file=sys.stderr)
    done = convert(planned, target, dry_run=a.dry_run, skip_bad=a.skip_bad, processes=a.processes)
    _report(
        a,
        target,
        done,
        f"{{}} cases, channels {', '.join(planned.channel_names)}, labels {', '.join(done.labels)} in {{}}",
    )


def _report(a: argparse.Namespace, target: Path, done: Converted, summary: str) -> None:
    from nnssl_ext.dataset_conversion.raw_dataset import told_together
    from nnssl_ext.errors import NnsslError

    good = [case for case in done.cases if case.problem is None]
    if a.dry_run:
        print(_table(done))
        print("would write " + summary.format(len(good), target))
        if done.problems and not a.skip_bad:
            raise told_together(done.problems)
    else:
        print("wrote " + summary.format(len(good), target))
        number = int(target.name[7:10])
        earlier = Path(os.environ.get("nnUNet_preprocessed", ""), target.name)
        if has_data := "nnUNet_preprocessed" in os.environ and earlier.is_dir():
            print(f"note: {earlier} is of an earlier {target.name}: delete it, with its split, if the cases changed")
        print(
            f"next: nnUNetv2_plan_and_preprocess -d {number} -pl nnsslPlannerPrimusM -c 3d_fullres --verify_dataset_integrity"
            + " --clean" * has_data
        )
    if done.problems and a.skip_bad:
        told = "\n".join(str(NnsslError(problem.what, problem.fix)) for problem in done.problems)
        print(f"left out {len(done.problems)} case(s):\n{told}", file=sys.stderr)


def _table(done: Converted) -> str:
    """One line per case, aligned."""
    rows = [("case", "voxels zyx", "mm zyx", "labels", "labelled", "files", "notes")]
    for case in done.cases:
        if case.shape and case.spacing:
            size, spacing = "x".join(map(str, case.shape)), "x".join(f"{s:.4g}" for s in case.spacing)
            values = f"{case.values[0]}-{case.values[-1]}"
            rows.append((case.identifier, size, spacing, values, f"{case.share:.1%}", case.how, case.notes))
        else:
            rows.append((case.identifier, "-", "-", "-", "-", "BAD", ""))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value
