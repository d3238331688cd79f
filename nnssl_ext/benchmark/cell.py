"""One cell: fit the checkpoint to the plans, train with stock ``nnUNetv2_train``, and keep what its validation says.

``python -m nnssl_ext.benchmark.cell FOLDER`` works on the ``job.json`` in a folder. The training sees a preprocessed folder
of its own, whose split holds the labelled subset and the test cases and nothing else. A cell that was stopped starts over, so
that it ends with the same figures.
"""

from __future__ import annotations

import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from nnssl_ext.benchmark.matrix import FAILURE, RESULT
from nnssl_ext.errors import NnsslError
from nnssl_ext.files import read_json, sha256_of, write_json
from nnssl_ext.programs import program
from nnssl_ext.reports.machine import best_device, machine, versions
from nnssl_ext.trainers.finetuning.settings import FinetuneSettings

JOB, LOG, PREDICTIONS = "job.json", "train.log", "predictions"
TRAINER = "nnsslFinetuneTrainer"
TAIL = 15
"""Lines of its log shown when a training fails."""


def work_on(folder: Path) -> None:
    """Do the job in a cell's folder, unless its result is there; leave ``result.json``, or ``failure.json``.

    Raises:
        NnsslError: what went wrong.
    """
    job = read_json(folder / JOB)
    with _alone(folder):
        result = folder / RESULT
        if result.is_file() and read_json(result).get("digest") == job["digest"]:
            return
        (folder / FAILURE).unlink(missing_ok=True)
        try:
            write_json(result, _trained(job, folder))
        except Exception as error:
            why = str(error) if isinstance(error, NnsslError) else f"{type(error).__name__}: {error}"
            write_json(folder / FAILURE, {"why": why})
            raise
        shutil.rmtree(folder / "work")


def _trained(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The cell's result; everything that training writes lies in ``work``."""
    started = time.monotonic()
    work, request = folder / "work", job["request"]
    shutil.rmtree(work, ignore_errors=True)
    _lay_out(job, work)
    plans = request["plans"]["plans_name"]
    device = job["device"] or best_device()
    weights = _weights(job, work)
    command = [
        *("nnUNetv2_train", request["dataset"], request["configuration"], "0", "-p", plans, "-tr", TRAINER),
        *("-device", device, "--disable_checkpointing"),
        *(("-pretrained_weights", str(weights)) if weights else ()),
    ]
    _run(
        command,
        {
            "nnUNet_preprocessed": str(work / "nnUNet_preprocessed"),
            "nnUNet_results": str(work / "nnUNet_results"),
            "nnUNet_n_proc_DA": str(request["workers"]),
        },
        folder / LOG,
    )
    fold = work / "nnUNet_results" / request["dataset"] / f"{TRAINER}__{plans}__{request['configuration']}" / "fold_0"
    ending = read_json(Path(job["preprocessed"]) / "dataset.json")["file_ending"]
    found = _collected(fold, request, ending)
    shutil.rmtree(folder / PREDICTIONS, ignore_errors=True)
    (fold / "validation").rename(folder / PREDICTIONS)
    (fold / "progress.png").replace(folder / "progress.png")
    return {
        "digest": job["digest"],
        **found,
        "command": shlex.join(command),
        "seconds": time.monotonic() - started,
        **_place(device),
        "request": request,
    }


def _lay_out(job: dict[str, Any], work: Path) -> None:
    """A preprocessed folder with the cell's own plans and split; the cases are links to the dataset's."""
    request, source = job["request"], Path(job["preprocessed"])
    plans = request["plans"]
    target = work / "nnUNet_preprocessed" / request["dataset"]
    target.mkdir(parents=True)
    for name in ("dataset.json", "dataset_fingerprint.json"):
        shutil.copyfile(source / name, target / name)
    for name in ("gt_segmentations", plans["configurations"][request["configuration"]]["data_identifier"]):
        (target / name).symlink_to(source / name, target_is_directory=True)
    write_json(target / f"{plans['plans_name']}.json", plans)
    write_json(target / "splits_final.json", [{"train": request["train"], "val": request["test"]}])


def _weights(job: dict[str, Any], work: Path) -> Path | None:
    """The checkpoint, fitted to the plans; what it lacks is initialised by the cell's seed."""
    if job["checkpoint"] is None:
        return None
    if sha256_of(Path(job["checkpoint"])) != job["request"]["checkpoint"]:
        raise NnsslError(f"{job['checkpoint']} has changed", "start nnssl_benchmark segmentation again")
    from nnssl_ext.checkpoints.adapt import adapt, read_pretrained
    from nnssl_ext.checkpoints.io import save_checkpoint

    request = job["request"]
    torch.manual_seed(settings_of(request).seed)
    source = read_pretrained(Path(job["checkpoint"]))
    dataset = read_json(Path(job["preprocessed"]) / "dataset.json")
    plans = request["plans"]
    adapted = adapt(source, plans, request["configuration"], dataset, plans["plans_name"])
    save_checkpoint(work / "pretrained.pth", adapted.content)
    return work / "pretrained.pth"


def _run(command: list[str], variables: dict[str, str], log: Path) -> None:
    with open(log, "w") as written:
        finished = subprocess.run(
            [program(command[0]), *command[1:]],
            check=False,
            env={**os.environ, **variables, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=written,
            stderr=subprocess.STDOUT,
        )
    if finished.returncode:
        last = "\n".join(f"    {line}" for line in log.read_text(errors="replace").splitlines()[-TAIL:])
        typed = " ".join([*(f"{name}={shlex.quote(value)}" for name, value in variables.items()), shlex.join(command)])
        raise NnsslError(
            f"nnUNetv2_train ended with exit code {finished.returncode}; the last lines of {log}:\n{last}",
            f"to repeat it: {typed}",
        )


def _collected(fold: Path, request: dict[str, Any], ending: str) -> dict[str, Any]:
    """Dice on the way and at the end, and that the training was the one asked for.

    Raises:
        NnsslError: it learnt from other cases, was judged by others, or pretrained weights did not arrive.
    """
    from nnssl_ext.trainers.finetuning.nnssl_finetune_trainer import EVALUATION, RECORD

    record = read_json(fold / RECORD)
    if sorted(record["train_cases"]) != request["train"]:
        raise NnsslError(f"trained on {record['train_cases']} instead of {request['train']}", "report this")
    if record["pretrained"] != (request["checkpoint"] is not None):
        raise NnsslError(
            "no pretrained weights arrived" if request["checkpoint"] else "weights arrived in a training from scratch",
            "see nnssl_inspect CHECKPOINT, and the transfer table of nnssl_adapt",
        )
    settings = settings_of(request)
    early = [read_json(fold / EVALUATION.format(epoch)) for epoch in settings.evaluated_epochs]
    last = {**record, "summary": read_json(fold / "validation" / "summary.json")}
    curve = [
        {
            "iterations": point["iterations"],
            "training_seconds": point["training_seconds"],
            "dice": dice_of(point["summary"], ending),
        }
        for point in (*early, last)
    ]
    for point in curve:
        if sorted(point["dice"]) != request["test"]:
            raise NnsslError(f"judged by {sorted(point['dice'])} instead of {request['test']}", "report this")
    return {"curve": curve, "changed_tensors": record["changed_tensors"]}


def dice_of(summary: dict[str, Any], ending: str) -> dict[str, dict[str, float | None]]:
    """Case -> label -> Dice from nnU-Net's summary; None where neither truth nor prediction has the label.

    Args:
        ending: of the label files, e.g. ``.nii.gz``.
    """
    found = {}
    for entry in summary["metric_per_case"]:
        values = {label: float(figures["Dice"]) for label, figures in entry["metrics"].items()}
        case = Path(entry["prediction_file"]).name.removesuffix(ending)
        found[case] = {label: None if math.isnan(value) else value for label, value in values.items()}
    return found


def settings_of(request: dict[str, Any]) -> FinetuneSettings:
    """The fine-tuning settings of a request."""
    from nnssl_ext.trainers.finetuning.settings import read_settings

    return read_settings(request["plans"], request["configuration"])


def _place(device: str) -> dict[str, Any]:
    return {"machine": machine(torch.device(device)), "versions": versions()}


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other process works on this cell. The system releases the lock of a process that was killed."""
    try:
        import fcntl
    except ImportError:  # Windows: do not start one benchmark twice
        yield
        return
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _end_with_parent() -> None:
    """When the benchmark is killed, its trainings must not go on: end this process group then."""
    parent = os.getppid()
    if os.name == "nt" or os.getpgrp() != os.getpid():
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    _end_with_parent()
    try:
        work_on(Path(sys.argv[1]))
    except NnsslError as told:
        print(f"error: {told}", file=sys.stderr)
        sys.exit(2)
