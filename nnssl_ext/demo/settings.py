"""What a demo run is, and where its files lie."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

PLANNERS = {"primus": "nnsslPlannerPrimusTiny", "resenc": "nnsslPlannerResEncTiny"}
PLANS = {"primus": "nnsslPrimusTinyPlans", "resenc": "nnsslResEncTinyPlans"}
ARMS = ("pretrained", "scratch")
CONFIGURATION = "3d_fullres"


@dataclass(frozen=True)
class DemoSettings:
    """One demo run. The defaults are our choice: some five minutes on two CPU cores.

    Attributes:
        output: everything is written below this folder.
        data: a Medical Segmentation Decathlon task folder; None generates phantoms.
        backbones: names from `PLANNERS`.
        modality: of the phantoms, ``"mr"`` or ``"ct"``.
        cases: cases used at most, held-out ones included.
        held_out: cases that neither planning nor training ever sees; Dice is measured on them.
        labelled: cases with labels for fine-tuning; pretraining sees the images of all training cases.
        pretrain_steps: optimiser steps of pretraining.
        finetune_steps: optimiser steps of each fine-tuning arm.
        device: ``"cpu"``, ``"cuda"`` or ``"mps"``.
        side_by_side: backbones worked on at the same time, one CPU core each.
    """

    output: Path
    data: Path | None = None
    backbones: tuple[str, ...] = ("primus", "resenc")
    modality: Literal["mr", "ct"] = "mr"
    cases: int = 40
    held_out: int = 8
    labelled: int = 3
    pretrain_steps: int = 300
    finetune_steps: int = 120
    device: str = "cpu"
    side_by_side: int = 2

    @property
    def name(self) -> str:
        """Of the dataset: the task's, without its number."""
        if self.data is None:
            return "Phantoms"
        folder = self.data.resolve().name
        return re.sub(r"[^A-Za-z0-9]+", "", folder.partition("_")[2] or folder) or "Task"

    @property
    def environment(self) -> dict[str, str]:
        """Variables of every command: nnU-Net's folders below `output`, and one thread and process per command."""
        folders = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "nnssl_results")
        return {
            **{name: str(self.output / name) for name in folders},
            "OMP_NUM_THREADS": "1",
            "nnUNet_n_proc_DA": "1",  # 0 would crash nnU-Net's planning
            "nnUNet_def_n_proc": "1",
            "nnUNet_compile": "f",
        }

    def results(self, arm: str) -> Path:
        """The arms differ in weights only, so nnU-Net gives them one name; each gets a results folder of its own."""
        return self.output / "nnUNet_results" / arm

    def predictions(self, backbone: str, arm: str) -> Path:
        """Predicted label maps of the held-out cases."""
        return self.output / "predictions" / f"{backbone}_{arm}"
