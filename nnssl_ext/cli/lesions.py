"""``nnssl_lesions``: lesion-wise detection measures of label maps, or a list of the lesions in them."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nnssl_ext.cli._console import console
from nnssl_ext.cli._run import run
from nnssl_ext.errors import NnsslError
from nnssl_ext.files import write_json


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="nnssl_lesions",
        description="Compare predicted label maps with the truth lesion by lesion (connected components): sensitivity, false "
        "positives per case, precision, beside Dice. Without truth: list the lesions.",
    )
    p.add_argument("predictions", type=Path, help="folder of label maps, e.g. what nnUNetv2_predict wrote")
    p.add_argument("truth", type=Path, nargs="?", help="folder with a label map of the same name for each prediction")
    p.add_argument("-l", type=int, nargs="+", default=[1], metavar="LABEL", help="values that are lesions (default: 1)")
    p.add_argument(
        "--min_volume", type=float, default=0.0, metavar="MM3", help="leave out smaller components (default: 0)"
    )
    p.add_argument("--iou", type=float, default=0.1, help="what counts as found (default: 0.1, as in nnDetection)")
    p.add_argument("--ending", default=".nii.gz", help="of the files (default: .nii.gz)")
    p.add_argument("-o", type=Path, metavar="FILE", help="write figures and every lesion as JSON")
    return p


def main() -> None:
    """Entry point of ``nnssl_lesions``."""
    run(_main)


def _main() -> int:
    args = parser().parse_args()
    from tqdm import tqdm

    from nnssl_ext.reports.lesions import Detection, detect, summarise_detection
    from nnssl_ext.reports.statistics import finite

    files = sorted(args.predictions.glob(f"[!.]*{args.ending}"))
    if not files:
        raise NnsslError(f"no *{args.ending} in {args.predictions}", "check the folder, or give --ending")
    cases: dict[str, Detection] = {}
    for path in tqdm(files, desc="lesions", unit="case", disable=None):
        predicted, spacing, grid = _read(path, args.l)
        truth = predicted
        if args.truth:
            truth, _, expected = _read(args.truth / path.name, args.l)
            if grid != expected:
                raise NnsslError(
                    f"case {path.name}: prediction and truth lie on different grids", "resample one of them"
                )
        cases[path.name.removesuffix(args.ending)] = detect(truth, predicted, spacing, args.min_volume, args.iou)
    out = console()
    listed: dict[str, Any] = {}
    for name, case in cases.items():
        lesions = [{"volume_mm3": lesion.volume, "centre_mm_zyx": lesion.centre} for lesion in case.predicted]
        listed[name] = {**asdict(case), "dice": finite(case.dice), "found": case.found} if args.truth else lesions
        if not args.truth:
            out.print(
                f"{name}: {len(lesions)} lesion(s), {sum(x.volume for x in case.predicted):.0f} mm^3", markup=False
            )
    figures = summarise_detection(list(cases.values())) if args.truth else {}
    left_out = sorted(_names(args.truth, args.ending) - cases.keys()) if args.truth else []
    if left_out:
        few = ", ".join(left_out[:5]) + ", ..." * (len(left_out) > 5)
        out.print(
            f"note: {len(left_out)} label map(s) of {args.truth} have no prediction and do not count: {few}",
            markup=False,
        )
    for key, value in figures.items():
        shown = f"{value:.3f}" if isinstance(value, float) else value
        out.print(f"{key.replace('_', ' ')}: {'-' if value is None else shown}", markup=False)
    if args.o:
        asked = {"labels": args.l, "min_volume_mm3": args.min_volume, "iou": args.iou}
        write_json(args.o, {"settings": asked, **figures, "without_prediction": left_out, "per_case": listed})
    return 0


def _names(folder: Path, ending: str) -> set[str]:
    return {path.name.removesuffix(ending) for path in folder.glob(f"[!.]*{ending}")}


def _read(path: Path, labels: list[int]) -> tuple[Any, tuple[float, float, float], tuple[Any, ...]]:
    """Lesion voxels, spacing in mm z, y, x, and what tells grids apart (rounded to 1 um)."""
    import numpy as np
    import SimpleITK as sitk

    if not path.is_file():
        raise NnsslError(f"no label map {path}", "every prediction needs a truth of the same name")
    try:
        image = sitk.ReadImage(str(path))
    except RuntimeError as error:
        raise NnsslError(f"cannot read {path}: {error}", "restore the file") from error
    if image.GetDimension() != 3:
        raise NnsslError(f"{path} has {image.GetDimension()} dimensions", "give label maps of volumes")
    z, y, x = image.GetSpacing()[::-1]
    place = (*image.GetSpacing(), *image.GetOrigin(), *image.GetDirection())
    return np.isin(sitk.GetArrayFromImage(image), labels), (z, y, x), (image.GetSize(), *np.round(place, 3).tolist())
