"""What a piece of work costs: seconds, CPU seconds, peak memory."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Cost:
    """Filled in when the work is done.

    Attributes:
        seconds: wall time.
        cpu_seconds: of all threads of this process.
        memory_gib: on CUDA the peak of the device; else, on Linux, how far the process grew. None where neither can be told.
        start_gib: the size of the process that growth is counted from.
    """

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    memory_gib: float | None = None
    start_gib: float | None = None


@contextmanager
def metered(device: torch.device, since: Cost | None = None) -> Iterator[Cost]:
    """Measure what happens inside of ``with``.

    Args:
        since: earlier work whose results are still needed: growth of memory is counted from its start.
    """
    cost = Cost()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    else:
        cost.start_gib = _reset_peak()
        if since is not None:
            cost.start_gib = since.start_gib
    started, cpu_started = time.perf_counter(), time.process_time()
    yield cost
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        cost.memory_gib = torch.cuda.max_memory_allocated(device) / 2**30
    else:
        peak = _status_gib("VmHWM")
        cost.memory_gib = None if peak is None or cost.start_gib is None else peak - cost.start_gib
    cost.seconds = time.perf_counter() - started
    cost.cpu_seconds = time.process_time() - cpu_started


def _reset_peak() -> float | None:
    """The size of the process now, from which Linux is told to count its peak; None where that is not possible."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # memory that the C library keeps would hide what the work needs
        RESET.write_text("5")  # proc(5): reset the peak resident set size
    except (OSError, AttributeError, TypeError):
        return None
    return _status_gib("VmRSS")


def _status_gib(name: str) -> float | None:
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    found = next((line.split()[1] for line in lines if line.startswith(f"{name}:")), None)
    return None if found is None else int(found) / 2**20  # KiB
