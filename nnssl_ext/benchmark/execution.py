"""Working through cells: side by side on this machine, or as SLURM jobs; and how long that will take."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from nnssl_ext.benchmark.cell import JOB, work_on
from nnssl_ext.benchmark.matrix import Benchmark, Cell
from nnssl_ext.errors import NnsslError
from nnssl_ext.files import write_json

Say = Callable[[str], None]
Run = Callable[[Cell, int], None]
"""Works on a cell in a slot (0, 1, ...) until its result is there, or raises."""

PILOT_ITERATIONS = 10


def execute(cells: Sequence[Cell], output: Path, run: Run, side_by_side: int, say: Say) -> dict[Cell, str]:
    """Run the cells that are open, `side_by_side` at a time. One that fails does not stop the others.

    Returns:
        Cell -> what went wrong.
    """
    waiting = [cell for cell in cells if cell.finished(output) is None]
    if len(waiting) < len(cells):
        say(f"{len(cells) - len(waiting)} of {len(cells)} cells are there already")
    slots: queue.SimpleQueue[int] = queue.SimpleQueue()
    for slot in range(side_by_side):
        slots.put(slot)

    def one(cell: Cell) -> None:
        slot = slots.get()
        try:
            run(cell, slot)
        finally:
            slots.put(slot)

    failures: dict[Cell, str] = {}
    pool = ThreadPoolExecutor(side_by_side)
    try:
        running = {pool.submit(one, cell): cell for cell in waiting}
        for number, future in enumerate(as_completed(running), start=1):
            cell = running[future]
            say(f"{number}/{len(waiting)} {_outcome(cell, output, future.exception(), failures)}")
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return failures


@dataclass
class Workers:
    """Runs each cell in a process of its own; on CUDA, each slot has one GPU.

    Attributes:
        gpus: what CUDA_VISIBLE_DEVICES is set to, per slot; empty leaves it alone.
    """

    benchmark: Benchmark
    output: Path
    device: str
    gpus: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._live: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def run(self, cell: Cell, slot: int) -> None:
        """Work on a cell.

        Raises:
            NnsslError: it left no result.
        """
        folder = write_job(self.benchmark, cell, self.output, self.device)
        variables = {"CUDA_VISIBLE_DEVICES": self.gpus[slot]} if self.gpus else {}
        with self._lock:
            if self._stopped:
                return
            process = subprocess.Popen(
                [sys.executable, "-m", "nnssl_ext.benchmark.cell", str(folder)],
                env={**os.environ, **variables},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # what it has to say is in failure.json
                start_new_session=True,
            )
            self._live.add(process)
        code = process.wait()
        with self._lock:
            self._live.discard(process)
        if code:
            raise NnsslError(cell.failure(self.output) or f"the cell's process ended with {code}", f"see {folder}")

    def stop(self) -> None:
        """End all trainings."""
        with self._lock:
            self._stopped = True
            for process in self._live:
                if os.name == "nt":
                    process.kill()
                else:
                    os.killpg(process.pid, signal.SIGKILL)


def submit(
    benchmark: Benchmark, cells: Sequence[Cell], output: Path, device: str | None, parameters: dict[str, Any], say: Say
) -> dict[Cell, str]:
    """Run open cells as jobs of a SLURM array, and wait for them.

    Args:
        device: None: each job takes cuda where it runs, if there is one, else cpu.
        parameters: of ``submitit.AutoExecutor.update_parameters``, e.g. ``slurm_partition``, ``gpus_per_node``, ``timeout_min``;
            ``cluster`` (``local``: processes on this machine) is the executor's.

    Returns:
        Cell -> what went wrong.

    Raises:
        NnsslError: submitit is missing, or refuses the parameters.
    """
    try:
        import submitit
    except ImportError as error:
        raise NnsslError("--slurm needs submitit", 'pip install "nnssl-ext[slurm]"') from error
    waiting = [cell for cell in cells if cell.finished(output) is None]
    try:
        chosen = dict(parameters)
        executor = submitit.AutoExecutor(output / "jobs", cluster=chosen.pop("cluster", None))
        executor.update_parameters(name="nnssl_benchmark", **chosen)
    except (RuntimeError, TypeError, NameError, ValueError) as error:
        raise NnsslError(f"--slurm: {error}", "see submitit's AutoExecutor.update_parameters") from error
    folders = [write_job(benchmark, cell, output, device) for cell in waiting]
    with executor.batch():
        jobs = [executor.submit(work_on, folder) for folder in folders]
    by_job = dict(zip(jobs, waiting, strict=True))
    say(f"submitted {len(jobs)} jobs; nnssl_benchmark report {output} shows how far they are")
    failures: dict[Cell, str] = {}
    for number, job in enumerate(submitit.helpers.as_completed(jobs, poll_frequency=2), start=1):
        say(f"{number}/{len(jobs)} {_outcome(by_job[job], output, job.exception(), failures)}")
    return failures


def write_job(benchmark: Benchmark, cell: Cell, output: Path, device: str | None) -> Path:
    """Write what a cell's process needs; returns the cell's folder."""
    folder = cell.folder(output)
    write_json(folder / JOB, benchmark.job(cell, device))
    return folder


def pilot(benchmark: Benchmark) -> Benchmark:
    """A few iterations from scratch with all plans in use, to learn how long cells take."""
    settings = {
        name: replace(
            each,
            iterations_per_epoch=min(PILOT_ITERATIONS, each.iterations_per_epoch),
            val_iterations_per_epoch=1,
            evaluations=0,
        )
        for name, each in benchmark.settings.items()
    }
    arms = tuple(arm for arm in benchmark.arms if arm.checkpoint is None)
    return replace(
        benchmark, arms=arms, train_cases=benchmark.train_cases[:1], epochs=(1,), seeds=1, settings=settings, against=()
    )


def seconds_ahead(benchmark: Benchmark, cells: Sequence[Cell], known: Sequence[tuple[str, dict[str, Any]]]) -> float:
    """Seconds that open cells will take one after the other, judged by cells that are done.

    Args:
        cells: those that are open.
        known: plans name and result of cells that are done; at least one for all plans in use.
    """
    total = 0.0
    for cell in cells:
        plans = benchmark.arm(cell.arm).plans
        done = [result for name, result in known if name == plans]
        ends = [result["curve"][-1] for result in done]
        step = median(end["training_seconds"] / end["iterations"] for end in ends)
        rest = median(
            (result["seconds"] - end["training_seconds"]) / len(result["curve"])
            for result, end in zip(done, ends, strict=True)
        )
        settings = replace(benchmark.settings[plans], epochs=cell.epochs)
        total += settings.total_iterations * step + (1 + len(settings.evaluated_epochs)) * rest
    return total


def _outcome(cell: Cell, output: Path, error: BaseException | None, failures: dict[Cell, str]) -> str:
    found = cell.finished(output)
    if found is None:
        failures[cell] = str(error or cell.failure(output) or "it left no result")
        return f"{cell}: FAILED: {failures[cell]}"
    return f"{cell}: {found['seconds']:.0f} s"
