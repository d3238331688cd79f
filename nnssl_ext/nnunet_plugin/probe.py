"""``python -m nnssl_ext.nnunet_plugin.probe``: what a fresh interpreter finds, as one line of JSON.

A process of its own, because only a fresh start shows whether the start-up file works, and because importing torch is
slow and can fail.
"""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path
from typing import Any

from nnssl_ext.nnunet_plugin import startup
from nnssl_ext.nnunet_plugin.registry import registry


def probe() -> dict[str, Any]:
    """Every lookup of the registry through nnU-Net's own function, the health of heavy imports, and the devices.

    Values of ``lookups`` and ``imports`` are None where all is well, else the error in one line.
    """
    return {"imports": {name: _error(importlib.import_module, name) for name in ("torchvision", "timm")}} | (
        _hook_state() | _devices()
    )


def _hook_state() -> dict[str, Any]:
    module = importlib.import_module(startup.LOOKUP_MODULE)
    package = importlib.import_module("nnunetv2")
    lookup = getattr(module, startup.LOOKUP)

    def check(current_module: str, name: str, target: str) -> None:
        folder = Path(package.__path__[0], *current_module.split(".")[1:])
        found = lookup(str(folder), name, current_module=current_module)
        if found is None or f"{found.__module__}:{found.__name__}" != target:
            raise LookupError(f"nnU-Net found {found} instead of {target}")

    return {
        "hooked": hasattr(lookup, "__wrapped__"),
        "parameters": list(inspect.signature(lookup).parameters),
        "lookups": {name: _error(check, where, name, target) for (where, name), target in registry().items()},
    }


def _devices() -> dict[str, Any]:
    torch = importlib.import_module("torch")
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "cuda": [f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB" for gpu in gpus],
        "cuda_build": torch.version.cuda,
        "mps": torch.backends.mps.is_available(),
        "threads": torch.get_num_threads(),
    }


def _error(function: Any, *arguments: Any) -> str | None:
    try:
        function(*arguments)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the finding
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


if __name__ == "__main__":
    print(json.dumps(probe()))
