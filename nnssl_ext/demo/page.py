"""The demo's report: what was run, how long it took, what was learnt, and the Dice of both arms."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from nnssl_ext.demo.runner import Step, exports_of
from nnssl_ext.demo.settings import ARMS, CONFIGURATION, PLANS, DemoSettings
from nnssl_ext.files import read_json
from nnssl_ext.reports.curves import read_log
from nnssl_ext.reports.machine import versions
from nnssl_ext.reports.page import Code, Picture, Section, Table, write_page
from nnssl_ext.reports.pictures import draw_planes, outline_colour


def write_demo_page(
    settings: DemoSettings,
    dataset: Path,
    runs: dict[str, Path],
    folds: dict[tuple[str, str], Path],
    steps: Sequence[Step],
    seconds: dict[str, float],
) -> Path:
    """Write ``output/report.html``.

    Args:
        settings: of this demo.
        dataset: the raw dataset, held-out cases in ``imagesTs`` and ``labelsTs``.
        runs: backbone -> pretraining folder.
        folds: (backbone, arm) -> fold folder of nnU-Net.
        steps: all commands in order.
        seconds: wall time per step name.

    Returns:
        Where it is.
    """
    dice = {
        (b, arm): read_dice(settings.predictions(b, arm) / "summary.json") for b in settings.backbones for arm in ARMS
    }
    names = read_json(dataset / "dataset.json")["labels"]
    sections = [
        Section("Result", [_budget(settings, dataset), *(_dice_table(b, names, dice) for b in settings.backbones)]),
        Section(
            "One held-out case", [_colours(names), *(_case_picture(settings, dataset, b) for b in settings.backbones)]
        ),
    ]
    for backbone in settings.backbones:
        sections.append(Section(f"Pretraining, {backbone}", _pretraining(runs[backbone])))
        sections.append(
            Section(f"Fine-tuning, {backbone}", [b for arm in ARMS for b in _finetuning(folds[backbone, arm], arm)])
        )
    sections += [
        Section("What the planner derived", _settings(runs)),
        Section("Commands", ["Every step, to repeat it by hand.", Code(_script(settings, steps))]),
        Section("Time", [_times(steps, seconds)]),
        Section("Versions", [_versions()]),
    ]
    path = settings.output / "report.html"
    write_page(path, f"nnssl_ext demo on {dataset.name}", sections)
    return path


def read_dice(summary: Path) -> dict[int, Float[np.ndarray, " cases"]]:
    """Label value -> Dice of every case, from nnU-Net's ``summary.json``. NaN: in neither truth nor prediction."""
    cases = read_json(summary)["metric_per_case"]
    labels = {int(label) for case in cases for label in case["metrics"]}
    return {label: np.array([float(c["metrics"][str(label)]["Dice"]) for c in cases]) for label in sorted(labels)}


def _budget(settings: DemoSettings, dataset: Path) -> str:
    learnt = len(list((dataset / "labelsTr").iterdir()))
    return (
        f"Masked autoencoding on the images of {learnt} cases for {settings.pretrain_steps} steps, then fine-tuning on "
        f"{settings.labelled} labelled cases for {settings.finetune_steps} steps, against training from scratch with the same "
        f"plans, cases and steps. Dice on {settings.held_out} cases that no step before prediction saw. One seed and a budget of "
        "minutes: this shows that the way through works, not what pretraining gives."
    )


def _dice_table(backbone: str, names: dict[str, int], dice: dict[tuple[str, str], dict[int, np.ndarray]]) -> Table:
    pretrained, scratch = (dice[backbone, arm] for arm in ARMS)
    rows: list[tuple[str, float, float, float, float]] = []
    for name, value in names.items():
        if value in pretrained:
            rows.append((name, *_compared(pretrained[value], scratch[value])))
    means = [np.nanmean(np.stack(list(arm.values())), axis=0) for arm in (pretrained, scratch)]
    rows.append(("mean", *_compared(*means)))
    header = ("structure", *ARMS, "difference", "standard error")
    return Table(
        header, rows, f"{backbone}: mean Dice over held-out cases; the standard error is that of the paired difference"
    )


def _compared(pretrained: np.ndarray, scratch: np.ndarray) -> tuple[float, float, float, float]:
    gain = pretrained - scratch
    error = float(np.nanstd(gain, ddof=1) / np.sqrt(np.isfinite(gain).sum())) if len(gain) > 1 else float("nan")
    a, b, c, d = (round(float(v), 3) for v in (np.nanmean(pretrained), np.nanmean(scratch), np.nanmean(gain), error))
    return a, b, c, d


def _colours(names: dict[str, int]) -> str:
    colours = (f"{name} {outline_colour(value)}" for name, value in names.items() if value)
    return f"Outlines: {', '.join(colours)}."


def _case_picture(settings: DemoSettings, dataset: Path, backbone: str) -> Picture:
    import SimpleITK as sitk

    ending = read_json(dataset / "dataset.json")["file_ending"]
    label = min((dataset / "labelsTs").glob(f"*{ending}"))
    case = label.name.removesuffix(ending)
    image = sitk.ReadImage(dataset / "imagesTs" / f"{case}_0000{ending}")
    files = {"truth": label, **{arm: settings.predictions(backbone, arm) / label.name for arm in ARMS}}
    outlines = {name: sitk.GetArrayFromImage(sitk.ReadImage(file)).astype(np.uint8) for name, file in files.items()}
    voxels = sitk.GetArrayFromImage(image)[None].astype(np.float32)
    png = settings.output / "pictures" / f"{backbone}_case.png"
    draw_planes({name: voxels for name in ("image", *outlines)}, png, image.GetSpacing()[::-1], labels=outlines)
    return Picture(png, f"{backbone}, case {case}")


def _pretraining(run: Path) -> list[str | Picture | Code]:
    log = read_log(run / "training_log.csv")
    before, after = (log["zero_predictor"][-1], log["loss"][-1])
    return [
        f"Error on hidden voxels in the last epoch: {after:.3f}, where predicting the mean everywhere makes {before:.3f}.",
        Picture(run / "progress.png", "training log"),
        Picture(run / "reconstruction_0000.png", "before training"),
        Picture(run / "reconstruction_final.png", "the same crop and mask at the end"),
        Code((run / "settings.json").read_text().strip(), "settings.json"),
    ]


def _finetuning(fold: Path, arm: str) -> list[str | Picture | Code]:
    record = read_json(fold / "finetuning.json")
    halves = record["changed_tensors"].items()
    arrived = ", ".join(f"{changed} of {total} {half} tensors" for half, (changed, total) in halves)
    return [
        f"{arm}: trained on {', '.join(record['train_cases'])}. Set by a checkpoint before training: {arrived}.",
        Picture(fold / "progress.png", f"nnU-Net's log, {arm}"),
        Code(json.dumps(record["settings"], indent=2), f"settings, {arm}"),
    ]


def _settings(runs: dict[str, Path]) -> list[Table]:
    tables = []
    for backbone, run in runs.items():
        plans = read_json(run / "plans.json")["configurations"][CONFIGURATION]
        block = plans["nnssl"]
        derived = {"normalization_schemes": plans["normalization_schemes"], "spacing": plans["spacing"], **block}
        rows: list[tuple[str, str]] = [(k, json.dumps(v)) for k, v in derived.items() if k not in ("schema", "reasons")]
        rows += [(f"why {name}", reason) for name, reason in block["reasons"].items()]
        tables.append(Table(("setting", "value"), rows, f"{PLANS[backbone]} (z, y, x; mm and voxels)"))
    return tables


def _script(settings: DemoSettings, steps: Sequence[Step]) -> str:
    lines = exports_of(settings.environment)
    if settings.data is None:
        lines.append("\n# phantoms: nnssl_ext.dataset_conversion.phantom_task.write_phantom_task")
    for step in steps:
        lines.append(f"\n# {step.name}\n{step}")
        if step is steps[0]:
            lines.append(
                f"# {settings.held_out} cases then moved to imagesTs and labelsTs: nnssl_ext.demo.data.hold_out"
            )
    return "\n".join(lines)


def _times(steps: Sequence[Step], seconds: dict[str, float]) -> Table:
    rows: list[tuple[str, float]] = [(step.name, round(seconds[step.name], 1)) for step in steps]
    return Table(("step", "seconds"), [*rows, ("sum (steps may overlap)", sum(value for _, value in rows))])


def _versions() -> Table:
    rows = list(versions().items())
    rows += [("Python", platform.python_version()), ("system", platform.platform()), ("CPU cores", str(os.cpu_count()))]
    return Table(("part", "version"), rows)
