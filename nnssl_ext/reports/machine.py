"""What measured figures depend on: hardware and versions."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

PACKAGES = ("nnssl-ext", "nnunetv2", "torch", "dynamic-network-architectures", "numpy", "SimpleITK")


def best_device() -> Literal["cuda", "cpu"]:
    """Where to compute if nobody says."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on, without names of computers or people."""
    described: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": device.type,
    }
    if device.type == "cuda":
        described["gpu"] = torch.cuda.get_device_name(device)
    if hasattr(os, "getloadavg"):
        described["load_average"] = round(os.getloadavg()[0], 1)
    return described


def peak_memory(device: torch.device) -> int | None:
    """The largest number of bytes so far: of the device since its count was reset on CUDA, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None  # Windows keeps no such count that Python could read
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def versions() -> dict[str, str]:
    """Of the packages that a result depends on."""
    return {name: version(name) for name in PACKAGES}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
