"""Devices and processes, through Lightning Fabric; started by hand, by torchrun or by SLURM."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

import torch
from lightning_fabric import Fabric

from nnssl_ext.engine.settings import RunSettings
from nnssl_ext.errors import NnsslError

T = TypeVar("T")


def launch(run: RunSettings) -> Fabric:
    """A launched Fabric: one process per GPU (or per CPU replica), data-parallel when there are several.

    Under torchrun and SLURM the environment says how many processes and nodes there are.

    Raises:
        NnsslError: the device is not there, or the environment says another number of processes than was asked for.
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


def on_first(fabric: Fabric, work: Callable[[], T]) -> T | None:
    """What `work` returns on the first process, None on the others.

    Raises:
        NnsslError: `work` did, on the first process; here it ends all of them alike.
    """
    found = refused = None
    if fabric.is_global_zero:
        try:
            found = work()
        except NnsslError as error:
            refused = error.what, error.fix
    if (refused := fabric.broadcast(refused)) is not None:
        raise NnsslError(*refused)
    return found


def _world(processes: int) -> tuple[int, int]:
    """Processes per node, and nodes."""
    env = os.environ
    if "LOCAL_WORLD_SIZE" in env and "WORLD_SIZE" in env:
        local = int(env["LOCAL_WORLD_SIZE"])
        started, nodes, who = local, int(env["WORLD_SIZE"]) // local, "torchrun"
    elif "SLURM_NTASKS" in env and env.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        nodes = int(env.get("SLURM_NNODES", "1"))
        started, who = int(env["SLURM_NTASKS"]) // nodes, "SLURM (SLURM_NTASKS)"
    else:
        return processes, 1
    if processes not in (1, started):
        raise NnsslError(
            f"-num_gpus {processes}, but {who} starts {started} process(es) on this node",
            "ask it for one task per GPU and start nnssl_train with srun, without -num_gpus; or unset SLURM_NTASKS",
        )
    return started, nodes


def _check_device(run: RunSettings) -> None:
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available[run.device]:
        raise NnsslError(f"-device {run.device}: this computer has none", "use -device cpu, or see nnssl_doctor")
    if run.device == "cuda" and run.processes > torch.cuda.device_count():
        raise NnsslError(f"-num_gpus {run.processes}: this computer has {torch.cuda.device_count()}", "lower -num_gpus")
