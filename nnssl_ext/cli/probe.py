"""``nnssl_probe``: what frozen features know of a labelled data set, without fine-tuning."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnssl_ext.cli._console import console
from nnssl_ext.cli._device import device_name
from nnssl_ext.cli._run import run
from nnssl_ext.cli._settings import settings_from_flags

if TYPE_CHECKING:
    from nnssl_ext.probing.settings import ProbeSettings

JSON, PAGE = "probe.json", "probe.html"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="nnssl_probe",
        description="Teach a linear, a non-linear and a kNN classifier of voxels on the frozen features of a checkpoint, and score "
        "them on other cases: Dice and HD95 per class, beside the same network with random weights and beside intensities. The "
        "checkpoint may be of nnssl-ext (also checkpoint_latest.pth of a run that still trains), nnssl (OpenMind) or nnU-Net.",
        epilog="Every setting is a flag too, e.g. --pyramid decoder --interpolation nearest; nnssl_probe --settings lists them.",
    )
    p.add_argument("checkpoint", type=Path, nargs="?", help="e.g. checkpoint_final.pth; also hf:OWNER/NAME")
    p.add_argument("-d", metavar="DATASET", help="preprocessed labelled data set: id or name, e.g. 4")
    p.add_argument("-p", metavar="PLANS", help="plans of the preprocessed cases (default: the checkpoint's)")
    p.add_argument("-c", metavar="CONFIG", help="configuration of them (default: the checkpoint's)")
    p.add_argument(
        "-o",
        type=Path,
        metavar="OUT",
        help="folder for probe.json and probe.html (default: beside the checkpoint; for hf: here)",
    )
    p.add_argument("--train", type=int, metavar="N", help="cases that teach (default: 20, or as many as there are)")
    p.add_argument("--test", type=int, metavar="N", help="cases that are scored (default: 20, or as many as there are)")
    p.add_argument("--seed", type=int, default=0, help="of cases, voxels and the non-linear head (default: 0)")
    p.add_argument(
        "--fold",
        type=int,
        help="draw from this fold of nnU-Net's splits_final.json: its training cases teach, its validation cases are scored "
        "(default: 0 where that file exists; else all cases are drawn from)",
    )
    p.add_argument("--ignore_splits", action="store_true", help="draw from all cases in spite of splits_final.json")
    p.add_argument("-device", choices=("cuda", "cpu", "mps"), help="default: cuda where there is one, else cpu")
    p.add_argument("--settings", action="store_true", help="list the settings of features and heads, and exit")
    return p


def main() -> None:
    """Entry point of ``nnssl_probe``."""
    run(_main, "lower --voxels and --batch_size; on a GPU, try -device cpu")


def _main() -> int:
    base = parser()
    args, rest = base.parse_known_args()
    if args.settings:
        _settings(["--help"])
    if args.checkpoint is None or args.d is None:
        base.error("CHECKPOINT and -d are required, e.g. nnssl_probe checkpoint_final.pth -d 4")
    if args.fold is not None and args.ignore_splits:
        base.error("--fold and --ignore_splits contradict each other")
    settings = _settings(rest)

    import torch

    from nnssl_ext.data.regions import read_region
    from nnssl_ext.files import write_json
    from nnssl_ext.paths import dataset_name
    from nnssl_ext.plans import preprocessed_folder
    from nnssl_ext.probing.cases import SPLITS, open_data
    from nnssl_ext.probing.evaluation import evaluate
    from nnssl_ext.registration.encoder import read_source
    from nnssl_ext.reports.probe import write_probe_page

    out = console()
    dataset = dataset_name(args.d)
    source = read_source(args.checkpoint)
    fold = args.fold
    if fold is None and not args.ignore_splits and (preprocessed_folder(dataset) / SPLITS).is_file():
        fold = 0
    data = open_data(source, dataset, args.p, args.c, args.train, args.test, args.seed, fold)
    out.print(str(source.pretrained), data.about, sep="\n", markup=False)
    content, answers = evaluate(source, data, settings, args.seed, torch.device(device_name(args.device)))
    folder = args.o or _beside(args.checkpoint) / f"probe_{Path(source.pretrained.origin).stem}_{dataset}"
    write_json(folder / JSON, content)
    first = data.test[0]
    region = read_region(first, (0, 0, 0), first.shape, labels=True)
    assert region.labels is not None
    write_probe_page(content, folder / PAGE, region.voxels, region.labels, answers, first.spacing)
    _show(content)
    out.print(f"wrote {folder / PAGE} and {JSON}", markup=False)
    return 0


def _beside(checkpoint: Path) -> Path:
    """The folder that a checkpoint lies in, where it lies in one."""
    from nnssl_ext.checkpoints.source import on_hub

    return Path() if on_hub(checkpoint) else checkpoint.parent


def _settings(flags: list[str]) -> ProbeSettings:
    from nnssl_ext.probing.settings import ProbeSettings

    return settings_from_flags(ProbeSettings(), flags, "nnssl_probe")


def _show(content: dict[str, Any]) -> None:
    from rich.table import Table

    out = console()
    classes = list(content["rows"][0]["dice"])
    table = Table("head", "features", *(f"{name} Dice" for name in classes), f"{classes[0]} HD95 mm")
    for row in sorted(content["rows"], key=lambda row: ["linear", "non-linear", "kNN"].index(row["head"])):
        dice = [_number(row["dice"][name]["mean"], 3) for name in classes]
        table.add_row(row["head"], row["features"], *dice, _number(row["hd95_mm"][classes[0]]["mean"], 1))
    out.print(table)
    out.print(*content["verdicts"], sep="\n", markup=False)
    for title, texts in (("leak check", content["leaks"]), ("note", content["notes"])):
        for text in texts:
            out.print(f"{title}: {text}", markup=False)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
