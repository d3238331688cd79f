"""What a run asks of labelled cases now and then: what, when, and the random-initialisation line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch

from nnssl_ext.contracts import Backbone, Method
from nnssl_ext.data.cases import list_cases
from nnssl_ext.engine.job import Job, data_folder
from nnssl_ext.engine.method import build_method
from nnssl_ext.errors import NnsslError
from nnssl_ext.files import read_json
from nnssl_ext.monitors.probe import Probe, is_labelled
from nnssl_ext.monitors.registration import RegistrationProbe
from nnssl_ext.plans import preprocessed_folder


@runtime_checkable
class Question(Protocol):
    """Something to ask of a frozen backbone."""

    def say(self, backbone: Backbone, device: torch.device) -> dict[str, float]:
        """Named figures."""
        ...


class OnlineProbe:
    """Asks the exported backbone every ``probe_epochs`` epochs and after the last one.

    Args:
        job: the run.
        device: where to compute.
        questions: what to ask.
    """

    def __init__(self, job: Job, device: torch.device, questions: Sequence[Question]) -> None:
        self.job, self.device, self.questions = job, device, questions
        self.random: dict[str, float] = {}

    def figures(self, epoch: int, method: Method) -> dict[str, float]:
        """All figures, and all with ``_random`` for the network as initialised by the run's seed, which is asked the first
        time; nothing when it is not the time."""
        last = epoch == self.job.settings.epochs - 1
        if epoch % self.job.run.probe_epochs and not last:
            return {}
        if not self.random:
            fresh: Any = build_method(self.job).export_backbone()  # with the labels that the method tells
            self.random = {f"{name}_random": value for name, value in self._ask(fresh.to(self.device)).items()}
        return {**self._ask(method.export_backbone()), **self.random}

    def _ask(self, backbone: Backbone) -> dict[str, float]:
        return {
            name: value for question in self.questions for name, value in question.say(backbone, self.device).items()
        }


def open_probe(job: Job, method: Method, device: torch.device) -> OnlineProbe | None:
    """The probe of a run, or None where it is switched off or there is nothing to ask.

    Raises:
        NnsslError: pairs to register are asked for, but there are no labels, or no epoch to ask in.
    """
    listing = preprocessed_folder(job.dataset) / "dataset.json"
    content = read_json(listing) if listing.exists() else {}
    labelled = is_labelled(content)
    if job.run.registration_pairs and not labelled:
        raise NnsslError(
            f"there are no labels in {job.dataset} to judge registration by", "leave --registration_pairs out"
        )
    if job.run.registration_pairs and job.run.probe_epochs < 1:
        raise NnsslError("--probe_epochs 0 asks for nothing to be registered", "leave --registration_pairs out as well")
    if job.run.probe_epochs < 1 or not labelled:
        return None
    questions: list[Question] = []
    ignore = content["labels"].get("ignore")
    if probe := Probe(job.cases, job.plan.global_crop, ignore):
        questions.append(probe)
    if job.run.registration_pairs:
        level = getattr(method, "feature_level", "")  # what the method trains, where that is not the default level
        cases, pairs = _registration_cases(job), job.run.registration_pairs
        questions.append(RegistrationProbe(cases, pairs, level, job.plan.global_crop, ignore))
    return OnlineProbe(job, device, questions) if questions else None


def _registration_cases(job: Job) -> Sequence[Any]:
    """The cases named for it, or those that are learned from."""
    if not job.run.registration_cases:
        return job.cases
    folder = data_folder(job.dataset, job.plans, job.plan.configuration)
    return list_cases(folder, job.plan.spacing, job.run.registration_cases)
