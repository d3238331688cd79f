"""Running console commands one after another or in chains side by side, with logs, and without repeating what is done."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from nnssl_ext.errors import NnsslError
from nnssl_ext.files import read_json, write_json
from nnssl_ext.programs import program

TAIL = 15
"""Lines of its log shown when a step fails."""


@dataclass(frozen=True)
class Step:
    """One console command.

    Attributes:
        name: unique; also names its log.
        command: program and arguments.
        products: what it makes; deleted before it runs, and needed for it to count as done.
        environment: variables for this step alone.
    """

    name: str
    command: tuple[str, ...]
    products: tuple[Path, ...]
    environment: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """The line to type."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*variables, shlex.join(self.command)])


class Runner:
    """Runs steps and remembers in ``folder/steps.json`` what is done.

    A step is kept if its command line and its products are still the same and it ran after the very execution of the
    step before it that counts now.

    Args:
        folder: gets ``logs/`` and ``steps.json``.
        environment: variables for all steps, on top of the caller's.
        console: where progress is shown.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str], console: Console) -> None:
        self.folder, self.environment, self.console = folder, environment, console
        self._record = folder / "steps.json"
        self._done: dict[str, dict[str, str | float]] = read_json(self._record) if self._record.exists() else {}
        self._after = "start"
        self._lock = threading.Lock()
        self._live: set[subprocess.Popen[str]] = set()
        self._stopped = False
        self._progress = Progress(
            SpinnerColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}", markup=False),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    @property
    def seconds(self) -> dict[str, float]:
        """Wall time of every step done, when it last ran."""
        return {name: float(done["seconds"]) for name, done in self._done.items()}

    def run(self, *chains: Sequence[Step], side_by_side: int = 1) -> None:
        """Run the steps of each chain in order, up to `side_by_side` chains at a time. What follows in later calls
        counts as built on these.

        Raises:
            NnsslError: a step failed, with its last lines and the command to repeat it; other chains are stopped.
        """
        after = self._after
        with self._progress, ThreadPoolExecutor(side_by_side) as pool:
            running = [pool.submit(self._chain, chain, after) for chain in chains]
            try:
                finished, _ = wait(running, return_when=FIRST_EXCEPTION)
                failed = [error for future in finished if (error := future.exception())]
                if failed:
                    raise failed[0]
                self._after = "+".join(future.result() for future in running)
            finally:
                self._stop()
        self._stopped = False

    def _chain(self, steps: Sequence[Step], after: str) -> str:
        """Returns the last execution in the chain; `after` is the one before it."""
        for step in steps:
            if self._is_done(step, after):
                self.console.print(f"     kept  {step.name}", highlight=False)
            elif not self._execute(step, after):
                break
            after = str(self._done[step.name]["execution"])
        return after

    def _is_done(self, step: Step, after: str) -> bool:
        known = self._done.get(step.name, {})
        same = (known.get("command"), known.get("after")) == (str(step), after)
        return same and all(product.exists() for product in step.products)

    def _execute(self, step: Step, after: str) -> bool:
        """Returns False, without running it, once another chain has failed."""
        for product in step.products:
            shutil.rmtree(product) if product.is_dir() else product.unlink(missing_ok=True)
        log = self.folder / "logs" / f"{step.name.replace(': ', '_').replace(' ', '_')}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        task = self._progress.add_task(step.name, total=None)
        start = time.monotonic()
        with self._lock:
            if self._stopped:
                return False
            process = subprocess.Popen(
                [program(step.command[0]), *step.command[1:]],
                env={**os.environ, **self.environment, **step.environment, "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
            self._live.add(process)
        with open(log, "w") as written:
            assert process.stdout is not None
            for line in process.stdout:  # universal newlines: each update of a progress bar is a line
                written.write(line)
                written.flush()
                if line.strip():
                    self._progress.update(task, description=f"{step.name}  {line.strip()[:90]}")
        code = process.wait()
        self._progress.remove_task(task)
        with self._lock:
            self._live.discard(process)
        if code != 0:
            raise self._failure(step, code, log)
        seconds = time.monotonic() - start
        self.console.print(f"{seconds:7.1f} s  {step.name}", highlight=False)
        with self._lock:
            self._done[step.name] = {
                "command": str(step),
                "seconds": round(seconds, 1),
                "execution": uuid.uuid4().hex,
                "after": after,
            }
            write_json(self._record, self._done)
        return True

    def _failure(self, step: Step, code: int, log: Path) -> NnsslError:
        last = "\n".join(f"    {line}" for line in log.read_text(errors="replace").splitlines()[-TAIL:])
        exports = "\n".join(exports_of(self.environment, "     "))
        return NnsslError(
            f"step '{step.name}' ended with exit code {code}; the last lines of {log}:\n{last}",
            f"to repeat it:\n{exports}\n     {step}\n     or run nnssl_demo again: what is done is kept",
        )

    def _stop(self) -> None:
        """End what still runs, and start nothing more; after success nothing runs."""
        with self._lock:
            self._stopped = True
            for process in self._live:
                process.terminate()


def exports_of(environment: Mapping[str, str], indent: str = "") -> list[str]:
    """Shell lines that set these variables."""
    return [f"{indent}export {name}={shlex.quote(value)}" for name, value in environment.items()]
