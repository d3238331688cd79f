"""Learning rates of fine-tuning, one per iteration, as plain functions of the settings."""

from __future__ import annotations

from dataclasses import dataclass

from nnssl_ext.trainers.finetuning.settings import FinetuneSettings


@dataclass(frozen=True)
class Rates:
    """Learning rates of one iteration, before layer-wise decay.

    Attributes:
        encoder: None while the encoder is frozen.
        decoder: also that of the segmentation layers.
    """

    encoder: float | None
    decoder: float


def warmup_poly(step: int, total: int, warmup: int) -> float:
    """Share of the peak at iteration `step` of `total`, both counted from 0.

    nnU-Net's two schedulers in sequence: (step + 1) / warmup, then (1 - (step - warmup) / (total - warmup)) ** 0.9.
    """
    if step < warmup:
        return (step + 1) / warmup
    return float((1 - (step - warmup) / (total - warmup)) ** 0.9)


def rates(settings: FinetuneSettings, step: int, pretrained: bool) -> Rates:
    """Learning rates of iteration `step`, counted from 0.

    Without pretrained weights there is nothing to protect: whatever the schedule's name, the whole network then
    follows ``warmup_poly`` with ``lr_scratch`` as its peak.
    """
    total = settings.total_iterations
    warmup = round(settings.warmup_share * total)
    if not pretrained:
        share = warmup_poly(step, total, warmup)
        return Rates(settings.lr_scratch * share, settings.lr_scratch * share)
    if settings.schedule == "frozen":
        return Rates(None, settings.lr_decoder * warmup_poly(step, total, warmup))
    alone = round(settings.freeze_share * total) if settings.schedule == "sawtooth" else 0
    if step < alone:
        share = warmup_poly(step, alone, alone // 2)
        return Rates(None, settings.lr_decoder * settings.freeze_lr_scale * share)
    share = warmup_poly(step - alone, total - alone, warmup)
    return Rates(settings.lr_encoder * share, settings.lr_decoder * share)
