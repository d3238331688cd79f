"""The main job from data to page."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from nnssl_ext.dataset_conversion.phantom_task import write_phantom_task
from nnssl_ext.dataset_conversion.phantoms import PhantomSettings
from nnssl_ext.demo import commands
from nnssl_ext.demo.data import hold_out
from nnssl_ext.demo.page import write_demo_page
from nnssl_ext.demo.runner import Runner
from nnssl_ext.demo.settings import ARMS, DemoSettings
from nnssl_ext.errors import NnsslError
from nnssl_ext.files import read_json, write_json


def run_demo(settings: DemoSettings, console: Console) -> Path:
    """Run all that is not done yet, and write the page.

    Returns:
        The page.

    Raises:
        NnsslError: unsuitable data, an output folder of something else, or a step that failed.
    """
    claim(settings.output)
    if settings.data and not (settings.data / "dataset.json").is_file():
        raise NnsslError(
            f"{settings.data} has no dataset.json",
            "give a Medical Segmentation Decathlon task folder, e.g. Task04_Hippocampus",
        )
    runner = Runner(settings.output, settings.environment, console)
    source = settings.data or _phantoms(settings, console)
    convert = commands.conversion(settings, source)
    runner.run([convert])
    dataset = convert.products[0]
    hold_out(dataset, settings.held_out)

    planning = commands.planning(settings)
    runner.run(planning)
    labels = [value for value in read_json(dataset / "dataset.json")["labels"].values() if value != 0]
    chains = [commands.learning(settings, backbone, labels) for backbone in settings.backbones]
    runner.run(*chains, side_by_side=settings.side_by_side)

    return write_demo_page(
        settings,
        dataset,
        runs={b: commands.run_folder(settings, b) for b in settings.backbones},
        folds={(b, arm): commands.fold_folder(settings, b, arm) for b in settings.backbones for arm in ARMS},
        steps=[convert, *planning, *(step for chain in chains for step in chain)],
        seconds=runner.seconds,
    )


def claim(output: Path) -> None:
    """Make sure that `output` is new, empty, or a demo's.

    Raises:
        NnsslError: it holds something else.
    """
    record = output / "steps.json"
    if record.exists():
        return
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise NnsslError(f"{output} holds something else than a demo", "choose a new folder with -o")
    write_json(record, {})


def _phantoms(settings: DemoSettings, console: Console) -> Path:
    folder = settings.output / "phantoms" / f"Task900_Phantoms_{settings.modality}_{settings.cases}"
    if not folder.exists():
        write_phantom_task(folder, PhantomSettings(modality=settings.modality), settings.cases)
        console.print(f"           wrote {settings.cases} phantoms to {folder}", highlight=False)
    return folder
