"""Scenes of `test_devices.py`, in a process of their own: ``python on_pretend_gpu.py '[[SCENE, ARGUMENT, ...], ...]'``.

Each does its work on the CPU and on the pretended GPU, which computes with the same kernels. The last line is a JSON list of
what the test asks about, for each scene.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import numpy as np
import SimpleITK as sitk
import torch
from lightning_fabric import Fabric
from lightning_fabric.accelerators import CPUAccelerator
from lightning_fabric.strategies import SingleDeviceStrategy
from pretend_gpu import NAME, pretend_gpu, waits
from tiny_dataset import CONFIGURATION, DATASET, job_of

from nnssl_ext.cli import probe, register
from nnssl_ext.engine import loop


class _AnyDevice(CPUAccelerator):
    def setup_device(self, device: torch.device) -> None:
        pass


def train(backbone: str, method: str, *flags: str) -> dict[str, int]:
    """Three steps, a crash, the third and the fourth again.

    Returns:
        Where and how often a step waited for the device.
    """
    strategy = SingleDeviceStrategy(torch.device(NAME, 0), accelerator=_AnyDevice())
    length = ("--epochs", "2", "--iterations", "2")
    jobs = [job_of(*length, *flags, "--name", place, method=method, backbone=backbone) for place in ("cpu", NAME)]
    loop.pretrain(jobs[0])
    places: dict[str, int] = {}
    crashes = iter([False, False, False, True])
    step = loop.optimizer_step

    def watched(parts, micro_batches, state):
        if next(crashes, False):
            raise KeyboardInterrupt
        before = waits.copy()
        done = step(parts, micro_batches, state)
        if state.step % 2 == 0:  # the first of an epoch also compares gradients
            places.update(waits - before)
        return done

    with (
        patch.object(loop, "launch", lambda run: Fabric(strategy=strategy)),
        patch.object(loop, "optimizer_step", watched),
    ):
        try:
            loop.pretrain(jobs[1])
        except KeyboardInterrupt:
            loop.pretrain(jobs[1], resume=True)
    return places


def both(module: object, main: Callable[[], None], command: list[str]) -> None:
    """A command on the CPU and on the pretended GPU; its output folder is called as the device."""
    for place in ("cpu", NAME):
        with (
            patch.object(sys, "argv", [*command, "-o", place]),
            patch.object(module, "device_name", lambda _, at=place: at),
        ):
            try:
                main()
            except SystemExit as ended:
                assert not ended.code


def registration(features: str, *flags: str) -> dict[str, object]:
    """``nnssl_register`` of the scans ``fixed.nii.gz`` and ``moving.nii.gz`` here, with labels."""
    scans = ("-f", "fixed.nii.gz", "-m", "moving.nii.gz", "--moving-labels", "labels.nii.gz", "--inverse")
    both(register, register.main, ["nnssl_register", *scans, "-c", features, *flags])

    apart = {}
    for name in ("displacement", "displacement_inverse", "warped", "warped_labels"):
        cpu, gpu = (sitk.GetArrayFromImage(sitk.ReadImage(f"{place}/{name}.nii.gz")) for place in ("cpu", NAME))
        apart[name] = float(np.abs(cpu.astype(float) - gpu).max())
    return apart


def probing(checkpoint: str) -> dict[str, object]:
    """``nnssl_probe`` of a checkpoint, with few steps and voxels."""
    small = ("--controls", "1", "--iterations", "20", "--voxels", "1024")
    both(probe, probe.main, ["nnssl_probe", checkpoint, "-d", DATASET, "--train", "3", "--test", "2", *small])
    cpu, gpu = (json.loads(Path(place, "probe.json").read_text())["rows"] for place in ("cpu", NAME))
    dice = [[value["mean"] for row in rows for value in row["dice"].values()] for rows in (cpu, gpu)]
    return {"rows": len(cpu), "apart": float(np.abs(np.subtract(*dice)).max())}


def finetuning(plans_name: str, weights: str) -> dict[str, object]:
    """An epoch of ``nnUNetv2_train -tr nnsslFinetuneTrainer -pretrained_weights``."""
    from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint

    trainer = get_trainer_from_args(
        DATASET, CONFIGURATION, 0, "nnsslFinetuneTrainer", plans_name, False, torch.device(NAME, 0)
    )
    trainer.plot_network_architecture = trainer._save_debug_information = lambda: None
    trainer.logger.plot_progress_png = lambda *_: None
    maybe_load_checkpoint(trainer, False, False, weights)
    trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 2, 2, 1
    trainer.run_training()
    return {"epochs": trainer.current_epoch, "device": str(next(trainer.network.parameters()).device)}


if __name__ == "__main__":
    scenes = {scene.__name__: scene for scene in (train, registration, probing, finetuning)}
    with pretend_gpu():
        outcomes = [scenes[name](*arguments) for name, *arguments in json.loads(sys.argv[1])]
    print(json.dumps(outcomes))
