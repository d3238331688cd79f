"""The checks behind ``nnssl_doctor``: is everything in place for the stock commands and ours?"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from nnssl_ext.nnunet_plugin.startup import DISABLE, PARAMETERS, disabled
from nnssl_ext.paths import VARIABLES

PACKAGES = (
    "nnssl-ext",
    "nnunetv2",
    "torch",
    "dynamic-network-architectures",
    "batchgeneratorsv2",
    "torchvision",
    "timm",
)
REINSTALL = "in the folder of nnssl_ext: pip install --force-reinstall --no-deps ."
LOW_DISK_GB = 10  # our choice: a few hundred preprocessed cases and their checkpoints
FEW_CORES = 4  # our choice: below this nnU-Net's default of 8-12 worker processes only wait for each other
PROBE_SECONDS = 300  # importing torch from a cold network disk can take minutes


@dataclass(frozen=True)
class Check:
    """One finding: ``fail`` stops work, ``warn`` costs time or narrows what works, ``ok`` informs; `fix` mends it."""

    name: str
    status: Literal["ok", "warn", "fail"]
    says: str
    fix: str = ""


def checks() -> Iterator[Check]:
    """All checks in reading order, each as soon as it is known; the ones about nnU-Net take some seconds."""
    yield from _versions()
    found = _probe()
    if isinstance(found, Check):
        yield found
    else:
        yield _hook(found)
        yield _signature(found)
        yield from _imports(found)
        yield _devices(found)
    yield from _threads()
    for variable, meaning in VARIABLES.items():
        yield _folder(variable, meaning)


def _versions() -> Iterator[Check]:
    install = f"{sys.executable} -m pip install"
    for package in PACKAGES:
        wanted = _requirement(package)
        try:
            found = version(package)
        except PackageNotFoundError:
            yield Check(package, "fail", "not installed", f"{install} '{package}{wanted}'")
            continue
        if wanted.contains(found, prereleases=True):
            yield Check(package, "ok", found)
        else:
            yield Check(package, "fail", f"{found}, but {wanted} is needed", f"{install} '{package}{wanted}'")


def _requirement(package: str) -> SpecifierSet:
    """The versions that nnssl_ext and nnU-Net allow together, from their own metadata."""
    wanted = SpecifierSet()
    for dependant in ("nnssl-ext", "nnunetv2"):
        try:
            lines = requires(dependant) or []
        except PackageNotFoundError:
            continue
        for requirement in map(Requirement, lines):
            if requirement.name == package and not requirement.marker:
                wanted &= requirement.specifier
    return wanted


def _probe() -> dict[str, Any] | Check:
    command = [sys.executable, "-m", "nnssl_ext.nnunet_plugin.probe"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False)
        return dict(json.loads(done.stdout.splitlines()[-1]))
    except subprocess.TimeoutExpired:
        problem = f"a fresh interpreter did not import nnU-Net within {PROBE_SECONDS} s"
    except (IndexError, ValueError):
        problem = (done.stderr.strip().splitlines() or ["no output"])[-1]
    return Check("hook", "fail", f"cannot ask nnU-Net: {problem}", f"see the whole error: {' '.join(command)}")


def _hook(found: dict[str, Any]) -> Check:
    lookups = found["lookups"]
    broken = {name: error for name, error in lookups.items() if error}
    if disabled():
        return Check("hook", "fail", f"switched off by {DISABLE}={os.environ[DISABLE]}", f"unset {DISABLE}")
    if not found["hooked"]:
        fix = f"{REINSTALL}, or: python -m nnssl_ext.nnunet_plugin.run COMMAND ..."
        return Check("hook", "fail", "not live: Python did not run our start-up file nnssl_ext.pth", fix)
    if broken:
        name, error = next(iter(broken.items()))
        says = f"live, but {len(broken)} of {len(lookups)} classes fail: {', '.join(broken)}"
        return Check("hook", "fail", says, f"{name}: {error}")
    if not lookups:
        return Check("hook", "fail", "live, but no class of ours is installed", REINSTALL)
    return Check("hook", "ok", f"live: nnU-Net finds all {len(lookups)} classes of nnssl_ext in a fresh process")


def _signature(found: dict[str, Any]) -> Check:
    given = found["parameters"]
    if tuple(given[: len(PARAMETERS)]) == PARAMETERS:
        return Check("class lookup", "ok", f"as expected: ({', '.join(given)})")
    says = f"nnU-Net's lookup takes ({', '.join(given)}), expected to start with ({', '.join(PARAMETERS)})"
    return Check("class lookup", "fail", says, "pip install 'nnunetv2==2.8.1', or a newer nnssl-ext")


def _imports(found: dict[str, Any]) -> Iterator[Check]:
    for name, error in found["imports"].items():
        if error:
            says = f"cannot be imported ({error}): stock trainers other than nnUNetTrainer fail; ours work"
            yield Check(f"import {name}", "warn", says, "install the torchvision that belongs to your torch")


def _devices(found: dict[str, Any]) -> Check:
    names = [f"cuda:{index} {gpu}" for index, gpu in enumerate(found["cuda"])] + ["mps"] * found["mps"]
    cpu = f"cpu ({_cores()} cores)"
    if names:
        return Check("devices", "ok", "; ".join([*names, cpu]))
    build = f"built for CUDA {found['cuda_build']}" if found["cuda_build"] else "built without CUDA"
    fix = "small planners (nnsslPlannerPrimusTiny, nnsslPlannerResEncTiny) train on a CPU"
    return Check("devices", "warn", f"no GPU (torch {build}); {cpu}", fix)


def _threads() -> Iterator[Check]:
    names = ("OMP_NUM_THREADS", "nnUNet_n_proc_DA", "nnUNet_def_n_proc")
    says = ", ".join(f"{name}={os.environ.get(name, '(unset)')}" for name in names)
    missing = [name for name in names if name not in os.environ]
    if os.environ.get("nnUNet_n_proc_DA") == "0":
        yield Check("threads", "warn", f"{says}: nnU-Net's planning crashes at 0", "export nnUNet_n_proc_DA=1")
    elif _cores() <= FEW_CORES and missing:
        fix = "export " + " ".join(f"{name}=1" for name in missing)
        yield Check("threads", "warn", f"{says}: many processes for {_cores()} cores", fix)
    else:
        yield Check("threads", "ok", says)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _folder(variable: str, meaning: str) -> Check:
    value = os.environ.get(variable)
    if not value:
        return Check(variable, "fail", f"not set ({meaning})", f"export {variable}=/path/to/{variable}")
    path = Path(value)
    if not path.is_dir():
        return Check(variable, "fail", f"no folder {path}", f"mkdir -p {shlex.quote(str(path))}")
    free = shutil.disk_usage(path).free / 1e9
    says = f"{path}, {free:.0f} GB free"
    if not _writable(path):
        needed: Literal["warn", "fail"] = "warn" if variable == "nnUNet_raw" else "fail"  # raw data may be read-only
        return Check(variable, needed, f"{says}, not writable", f"make {path} writable or point {variable} elsewhere")
    if free < LOW_DISK_GB:
        return Check(variable, "warn", says, f"free space there or point {variable} to another disk")
    return Check(variable, "ok", says)


def _writable(path: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=path):
            return True
    except OSError:
        return False
