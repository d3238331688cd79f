"""Fine-tuning for stock ``nnUNetv2_train -tr nnsslFinetuneTrainer``, with or without ``-pretrained_weights``."""

from __future__ import annotations

import os
import random
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from nnssl_ext.errors import NnsslError
from nnssl_ext.files import read_json, write_json
from nnssl_ext.trainers.finetuning.augmentation import keep_augmentation
from nnssl_ext.trainers.finetuning.groups import Half, IterationSchedule, freeze_unused_heads, parameter_groups
from nnssl_ext.trainers.finetuning.settings import BLOCK, read_settings
from nnssl_ext.trainers.finetuning.subset import training_subset
from nnssl_ext.trainers.finetuning.transfer import arrivals, restore, snapshot

RECORD = "finetuning.json"
"""Written to the fold's folder: the settings, whether pretrained weights arrived, and the training cases."""

EVALUATION = "evaluation_epoch_{}.json"
"""Beside it, as often as `FinetuneSettings.evaluations` says: nnU-Net's summary of a validation before the end."""

_FREE_ON_RESUME = {"threads", "save_every", "evaluations"}


class nnsslFinetuneTrainer(nnUNetTrainer):
    """nnU-Net's trainer with learning rates per iteration, half and layer, set up by the plans.

    All settings come from the plans block ``nnssl_finetuning`` (``settings.FinetuneSettings``). Whether pretrained
    weights arrived is found by comparing with the initial ones; if none did, the run is an equal-budget training from
    scratch at ``lr_scratch``.
    """

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 (nnU-Net's signature)
    ) -> None:
        self.settings = settings = read_settings(plans, configuration)
        self._continuing = bool(plans.get("continue_training"))
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.initial_lr = settings.lr_decoder
        self.weight_decay = settings.weight_decay
        self.oversample_foreground_percent = settings.oversample_foreground
        self.num_iterations_per_epoch = settings.iterations_per_epoch
        self.num_val_iterations_per_epoch = settings.val_iterations_per_epoch
        self.num_epochs = settings.epochs
        self.save_every = settings.save_every
        self.enable_deep_supervision = settings.deep_supervision
        if settings.batch_size is not None:
            self.configuration_manager.configuration["batch_size"] = settings.batch_size
        threads = settings.threads or os.environ.get("OMP_NUM_THREADS")
        if self.device.type == "cpu" and threads:
            torch.set_num_threads(int(str(threads).split(",")[0]))  # OpenMP takes one number per level
        self._initial: dict[str, Tensor] = {}
        self._resumed = False
        self._iteration = 0

    @property
    def _plain_network(self) -> nn.Module:
        network = self.network.module if isinstance(self.network, DistributedDataParallel) else self.network
        return network._orig_mod if isinstance(network, OptimizedModule) else network

    def initialize(self) -> None:
        torch.manual_seed(self.settings.seed)
        super().initialize()
        self._initial = snapshot(self._plain_network)

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        if hasattr(getattr(self._plain_network, "decoder", None), "deep_supervision"):
            super().set_deep_supervision_enabled(enabled)

    # --- optimisation ---------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> tuple[Optimizer, Any]:
        settings = self.settings
        if not self.enable_deep_supervision:
            freeze_unused_heads(self._plain_network)
        groups = parameter_groups(self._plain_network, settings)
        optimizer: Optimizer
        if settings.optimizer == "sgd":
            optimizer = torch.optim.SGD(groups, lr=0.0, momentum=settings.momentum, nesterov=True)
        else:
            optimizer = torch.optim.AdamW(groups, lr=0.0, betas=settings.betas, fused=self.device.type == "cuda")
        optimizer.register_step_pre_hook(self._clip_gradients)
        return optimizer, IterationSchedule(optimizer, settings)

    def _clip_gradients(self, optimizer: Optimizer, *_: Any) -> None:
        """nnU-Net's own clipping to 12 came before; frozen parameters must not move by momentum or weight decay."""
        for group in optimizer.param_groups:
            if group["frozen"]:
                for parameter in group["params"]:
                    parameter.grad = None
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.settings.gradient_clip)

    def on_train_epoch_start(self) -> None:
        self._seed(self.current_epoch)
        self._iteration = self.current_epoch * self.num_iterations_per_epoch
        super().on_train_epoch_start()

    def train_step(self, batch: dict) -> dict:
        self.lr_scheduler.at(self._iteration)
        self._iteration += 1
        if not self.is_ddp:  # DDP waits for the gradients it saw at its construction
            for group in self.optimizer.param_groups:
                for parameter in group["params"] if group["half"] == "encoder" else ():
                    parameter.requires_grad_(not group["frozen"])
        return super().train_step(batch)

    def _seed(self, epoch: int) -> None:
        """Make an epoch's random numbers independent of what came before, so that resuming repeats them."""
        words = np.random.SeedSequence([self.settings.seed, epoch, self.local_rank]).generate_state(3)
        random.seed(int(words[0]))
        np.random.seed(words[1])
        torch.manual_seed(int(words[2]))

    # --- evaluation on the way ------------------------------------------------------------------------------------

    def on_epoch_end(self) -> None:
        super().on_epoch_end()
        if self.current_epoch in self.settings.evaluated_epochs:
            self._evaluate()

    def on_train_end(self) -> None:
        super().on_train_end()
        if self.local_rank == 0:
            write_json(self._record_file, {**read_json(self._record_file), **self._spent()})

    def _evaluate(self) -> None:
        """nnU-Net's validation as after the last epoch; random numbers are seeded anew by the next epoch anyway."""
        self.perform_actual_validation()
        self.set_deep_supervision_enabled(self.enable_deep_supervision)
        if self.local_rank == 0:
            validation = Path(self.output_folder) / "validation"
            summary = {**self._spent(), "summary": read_json(validation / "summary.json")}
            write_json(self._evaluation_file, summary)
            shutil.rmtree(validation)  # else cases of this one could pass for those of the last

    def _spent(self) -> dict[str, int | float]:
        """Work so far; seconds are the epochs' as nnU-Net times them, evaluations left out."""
        ends, starts = (
            self.logger.get_value(f"epoch_{name}_timestamps", step=None)[: self.current_epoch]
            for name in ("end", "start")
        )
        seconds = sum(end - start for end, start in zip(ends, starts, strict=True))
        return {"iterations": self.current_epoch * self.num_iterations_per_epoch, "training_seconds": seconds}

    # --- pretrained weights, resume -------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        self._seed(self.current_epoch)
        super().on_train_start()
        if self._resumed:
            self._continue_record()
            if self.current_epoch in self.settings.evaluated_epochs and not self._evaluation_file.is_file():
                self._evaluate()  # nnU-Net saves before it, and the process ended in between
        else:
            self._receive_weights()
        self._initial = {}

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        super().load_checkpoint(filename_or_checkpoint)
        self._resumed = True

    @property
    def _record_file(self) -> Path:
        return Path(self.output_folder) / RECORD

    @property
    def _evaluation_file(self) -> Path:
        return Path(self.output_folder) / EVALUATION.format(self.current_epoch)

    def _receive_weights(self) -> None:
        """Say whether pretrained weights arrived, undo the half that is not to be transferred, and leave a record."""
        network, settings = self._plain_network, self.settings
        found = arrivals(network, self._initial)
        wanted: tuple[Half, ...] = ("encoder", "decoder") if settings.transfer == "both" else (settings.transfer,)
        pretrained = any(found[half].changed for half in wanted)
        if pretrained:
            self.print_to_log_file(
                f"pretrained weights arrived: {found['encoder']} encoder and {found['decoder']} decoder tensors differ "
                f"from initialisation; transferring {' and '.join(wanted)}"
            )
            for half in found.keys() - {"head", *wanted}:
                restore(network, self._initial, half)
        else:
            self._refuse_lost_weights()
            self.print_to_log_file(
                f"training from scratch: no tensor of {' and '.join(wanted)} differs from initialisation; "
                f"peak learning rate {settings.lr_scratch} for the whole network"
            )
        self.lr_scheduler.pretrained = pretrained
        if self.local_rank == 0:
            write_json(
                self._record_file,
                {
                    "settings": asdict(settings),
                    "pretrained": pretrained,
                    "changed_tensors": {half: [a.changed, a.total] for half, a in found.items()},
                    "train_cases": sorted(self.do_split()[0]),
                },
            )

    def _refuse_lost_weights(self) -> None:
        """``--c`` without a checkpoint makes nnU-Net start anew, and the pretrained weights would be lost silently."""
        if self._continuing and self._record_file.is_file() and read_json(self._record_file)["pretrained"]:
            raise NnsslError(
                f"{self.output_folder} began from pretrained weights and was stopped before its first checkpoint",
                "start it again without --c and with -pretrained_weights",
            )

    def _continue_record(self) -> None:
        """Take over whether the run began from pretrained weights; refuse settings that changed meanwhile."""
        record = read_json(self._record_file)
        now = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self.settings).items()}
        changed = [
            f"{name} {before!r} -> {now.get(name)!r}"
            for name, before in record["settings"].items()
            if name not in _FREE_ON_RESUME and now.get(name) != before
        ]
        if changed:
            raise NnsslError(
                f"cannot continue {self.output_folder}: settings changed: {', '.join(changed)}",
                f"restore the plans block {BLOCK}, or start a new run without --c",
            )
        self.lr_scheduler.pretrained = record["pretrained"]

    # --- data -----------------------------------------------------------------------------------------------------

    def do_split(self) -> tuple[list[str], list[str]]:
        train, validation = super().do_split()
        if self.settings.train_cases is not None:
            train = training_subset(train, self.settings.train_cases, self.settings.subset_seed)
            self.print_to_log_file(f"training on {len(train)} case(s): {', '.join(sorted(train))}")
        return train, validation

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple[Any, bool, Any, Any]:
        rotation, dummy_2d, initial_size, axes = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        if not self.settings.mirroring:
            axes = self.inference_allowed_mirroring_axes = None
        if not self.settings.spatial_augmentation:
            initial_size = self.configuration_manager.patch_size
        return rotation, dummy_2d, initial_size, axes

    def get_training_transforms(self, *args: Any, **kwargs: Any) -> BasicTransform:  # type: ignore[override]
        everything = nnUNetTrainer.get_training_transforms(*args, **kwargs)
        return keep_augmentation(everything, self.settings.spatial_augmentation, self.settings.intensity_augmentation)
