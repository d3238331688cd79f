"""The online probe of a run: when it asks, and its random-initialisation line."""

from __future__ import annotations

from typing import Any

import torch

from nnssl_ext.contracts import Method
from nnssl_ext.engine.job import Job
from nnssl_ext.files import read_json
from nnssl_ext.monitors.probe import Probe, is_labelled
from nnssl_ext.networks.build import build_backbone
from nnssl_ext.plans import preprocessed_folder


class OnlineProbe:
    """Asks the exported backbone every ``probe_epochs`` epochs and after the last one.

    Args:
        job: the run.
        device: where to compute.
    """

    def __init__(self, job: Job, device: torch.device) -> None:
        self.job, self.device = job, device
        self.probe = Probe(job.cases, job.plan.global_crop)
        self.random: dict[str, float] = {}

    def figures(self, epoch: int, method: Method) -> dict[str, float]:
        """``probe_dice``, ``knn_dice``, and both with ``_random`` for the network as initialised by the run's seed, which
        is asked the first time; nothing when it is not the time."""
        last = epoch == self.job.settings.epochs - 1
        if not self.probe or (epoch % self.job.run.probe_epochs and not last):
            return {}
        if not self.random:
            torch.manual_seed(self.job.run.seed)
            fresh: Any = build_backbone(self.job.plans, self.job.plan.configuration, self.job.plan.channels)
            asked = self.probe.say(fresh.to(self.device), self.device)
            self.random = {f"{name}_random": value for name, value in asked.items()}
        return {**self.probe.say(method.export_backbone(), self.device), **self.random}


def open_probe(job: Job, device: torch.device) -> OnlineProbe | None:
    """The probe of a run, or None where it is switched off or the dataset has no labels."""
    listing = preprocessed_folder(job.dataset) / "dataset.json"
    if job.run.probe_epochs < 1 or not listing.exists() or not is_labelled(read_json(listing)):
        return None
    return OnlineProbe(job, device)
