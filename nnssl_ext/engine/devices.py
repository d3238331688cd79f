"""Devices and processes, through Lightning Fabric; started by hand, by torchrun or by SLURM."""

from __future__ import annotations

import os

import torch
from lightning_fabric import Fabric

from nnssl_ext.engine.settings import RunSettings
from nnssl_ext.errors import NnsslError


def launch(run: RunSettings) -> Fabric:
    """A launched Fabric: one process per GPU (or per CPU replica), data-parallel when there are several.

    Under torchrun and SLURM the environment says how many processes and nodes there are.

    Raises:
        NnsslError: the device is not there.
    """
    _check_device(run)
    processes, nodes = _world(run.processes)
    fabric = Fabric(
        accelerator=run.device,
        devices=processes,
        num_nodes=nodes,
        strategy="ddp" if processes * nodes > 1 else "auto",
        precision="32-true",
    )
    fabric.launch()
    return fabric


def _world(processes: int) -> tuple[int, int]:
    env = os.environ
    if "LOCAL_WORLD_SIZE" in env and "WORLD_SIZE" in env:  # torchrun
        local = int(env["LOCAL_WORLD_SIZE"])
        return local, int(env["WORLD_SIZE"]) // local
    if "SLURM_NTASKS" in env and env.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        nodes = int(env.get("SLURM_NNODES", "1"))
        return int(env["SLURM_NTASKS"]) // nodes, nodes
    return processes, 1


def _check_device(run: RunSettings) -> None:
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available[run.device]:
        raise NnsslError(f"-device {run.device}: this computer has none", "use -device cpu, or see nnssl_doctor")
    if run.device == "cuda" and run.processes > torch.cuda.device_count():
        raise NnsslError(f"-num_gpus {run.processes}: this computer has {torch.cuda.device_count()}", "lower -num_gpus")
