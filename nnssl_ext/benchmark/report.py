"""The report of a benchmark, finished or not: one page, and a JSON with the same numbers."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer

from nnssl_ext.benchmark.cell import PREDICTIONS
from nnssl_ext.benchmark.matrix import Cell
from nnssl_ext.benchmark.record import load
from nnssl_ext.benchmark.summary import summarise
from nnssl_ext.errors import NnsslError
from nnssl_ext.files import read_json, write_json
from nnssl_ext.paths import folder
from nnssl_ext.reports.page import Picture
from nnssl_ext.reports.pictures import draw_planes, outline_colour
from nnssl_ext.reports.segmentation_benchmark import write_segmentation_page


def write_report(output: Path) -> dict[str, Any]:
    """Write ``report.json`` and ``report.html`` from the cells that are there.

    Returns:
        The content of the JSON.

    Raises:
        NnsslError: there is no benchmark, or a file cannot be written.
    """
    record, cells = load(output)
    content = summarise(record, cells, output)
    write_json(output / "report.json", content)
    with tempfile.TemporaryDirectory() as scratch:
        pictures: list[Picture | str] = []
        for compared in _worth_a_look(content):
            for which in ("best", "worst"):
                try:
                    pictures.append(_picture(record, cells, compared, which, output, Path(scratch)))
                except (NnsslError, OSError, RuntimeError) as error:  # the page must not fail for want of a picture
                    pictures.append(f"No picture of {compared['first']}, {which} case: {error}")
        write_segmentation_page(content, pictures, output / "report.html")
    return content


def slices_through(labels: Integer[np.ndarray, "Z Y X"]) -> list[int]:
    """The voxel whose three planes hold most foreground each; the middle where there is none."""
    foreground = labels > 0
    if not foreground.any():
        return [size // 2 for size in labels.shape]
    return [int(foreground.sum(axis=tuple({0, 1, 2} - {axis})).argmax()) for axis in range(3)]


def _worth_a_look(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Per pair of arms, the comparison with the fewest labels and, of those, the longest schedule."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for each in content["comparisons"]:
        pair = each["first"], each["second"]
        best = found.get(pair)
        if each["best_case"] and (
            best is None or (each["train_cases"], -each["epochs"]) < (best["train_cases"], -best["epochs"])
        ):
            found[pair] = each
    return list(found.values())


def _picture(
    record: dict[str, Any], cells: list[Cell], compared: dict[str, Any], which: str, output: Path, scratch: Path
) -> Picture:
    """Truth and both arms' predictions, outlined over the first channel."""
    import SimpleITK as sitk
    from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

    case, seed = compared[f"{which}_case"], compared["seeds"][0]
    preprocessed = Path(record["preprocessed"])
    names = read_json(preprocessed / "dataset.json")
    files = get_filenames_of_train_images_and_targets(str(folder("nnUNet_raw") / record["dataset"]))
    if case not in files:
        raise NnsslError(f"{folder('nnUNet_raw') / record['dataset']} does not hold {case}", "restore the raw dataset")
    image = sitk.ReadImage(files[case]["images"][0])
    maps = {"truth": preprocessed / "gt_segmentations" / f"{case}{names['file_ending']}"}
    for arm in (compared["first"], compared["second"]):
        wanted = arm, compared["train_cases"], compared["epochs"], seed
        cell = next(c for c in cells if (c.arm, c.train_cases, c.epochs, c.seed) == wanted)
        maps[arm] = cell.folder(output) / PREDICTIONS / f"{case}{names['file_ending']}"
    outlines = {name: sitk.GetArrayFromImage(sitk.ReadImage(str(path))).astype(np.uint8) for name, path in maps.items()}
    voxels = sitk.GetArrayFromImage(image)[None].astype(np.float32)
    png = scratch / f"{compared['first']}_{compared['second']}_{which}.png"
    volumes = {name: voxels for name in ("image", *outlines)}
    draw_planes(volumes, png, image.GetSpacing()[::-1], outlines, slices_through(outlines["truth"]))
    colours = ", ".join(
        f"{name} {outline_colour(value)}" for name, value in names["labels"].items() if type(value) is int and value > 0
    )
    return Picture(
        png,
        f"{compared['title']}, {which} case by the difference in Dice: {case}, seed {seed}. Planes through the most "
        f"foreground. Outlines: {colours}.",
    )
