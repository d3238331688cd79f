"""A probe from a checkpoint to its result."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Int
from torch import nn

from nnssl_ext.errors import NnsslError
from nnssl_ext.probing.arms import PRETRAINED, arms_of, describer, fingerprint, frozen
from nnssl_ext.probing.cases import ProbeData
from nnssl_ext.probing.run import Result, measure
from nnssl_ext.probing.settings import ProbeSettings
from nnssl_ext.probing.summary import Row, rows_of, summarise
from nnssl_ext.registration.encoder import Source
from nnssl_ext.reports.machine import machine

Answers = dict[tuple[str, str], Int[np.ndarray, "Z Y X"]]
"""(features, head) -> labels of the first scored case."""


def evaluate(
    source: Source, data: ProbeData, settings: ProbeSettings, seed: int, device: torch.device
) -> tuple[dict[str, Any], Answers]:
    """Measure the checkpoint's features and their controls.

    Returns:
        The content of ``probe.json``, and what is needed for a picture.

    Raises:
        NnsslError: a checkpoint without (all of) an encoder, or without a trained decoder where that is asked for; training
            cases of one class; a damaged case.
    """
    channels = {case.channels for case in (*data.train, *data.test)}
    if len(channels) > 1:
        raise NnsslError(f"cases of {data.dataset} have {sorted(channels)} channels", "preprocess them again")
    arms = arms_of(source, channels.pop(), settings, device)
    rows: list[Row] = []
    answers: Answers = {}
    widths: dict[str, int] = {}
    notes: Sequence[str] = ()
    digest = ""
    population: Sequence[int] = ()
    for arm in arms:
        results: list[Result] = []
        for number, make in enumerate(arm.makers, start=1):
            encoder = make()
            title = arm.name if len(arm.makers) == 1 else f"{arm.name} {number}/{len(arm.makers)}"
            with frozen(encoder):
                results.append(measure(describer(encoder, settings), data, settings, seed, device, title))
            if arm.name == PRETRAINED and encoder is not None:
                notes, digest = encoder.notes, fingerprint(cast(nn.Module, encoder.backbone))
        population, widths[arm.name] = results[0].population, results[0].channels
        answers |= {(arm.name, head): labels for head, labels in results[0].answers.items()}
        rows += rows_of(arm, results, data)
    content = summarise(source, data, settings, seed, arms, rows, population, widths, digest, notes, machine(device))
    return json.loads(json.dumps(content)), answers
