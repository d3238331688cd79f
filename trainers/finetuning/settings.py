"""Settings of fine-tuning, read from the block ``nnssl_finetuning`` of a plans file. Loads no torch.

Sources of the values: **OpenMind** (arXiv 2412.17041: 150 epochs, warm-up over 15, then poly; CNN SGD 1e-3, from scratch
1e-2, weight decay 3e-5; Primus AdamW 1e-4, from scratch 3e-4, weight decay 5e-2), **nnU-Net** (its trainer), **Primus**
(arXiv 2503.01835 and nnU-Net's Primus trainers), a thesis on SimSiam (Swin UNETR), and **measured** (hippocampus, one CPU thread, the small presets).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from nnssl_ext.errors import NnsslError, unknown_name
from nnssl_ext.plans import FINETUNING as BLOCK
from nnssl_ext.plans import configuration_of

Backbone = Literal["primus", "unet", "swin"]


@dataclass(frozen=True)
class FinetuneSettings:
    """How a segmentation network is trained, from pretrained weights or from scratch.

    An iteration is one optimiser step; schedules count iterations, so a run has exactly ``total_iterations``.

    Attributes:
        schedule: ``warmup_poly``: linear warm-up, then nnU-Net's poly decay. ``frozen``: the same with the encoder
            fixed. ``sawtooth``: the decoder alone (half linear up, half poly down), then the whole network from a
            second warm-up (best for CNNs in OpenMind, Dice 76.60 against 76.33; Primus did best with warm-up).
        transfer: which pretrained halves to keep; the other one is put back to its own initialisation.
        optimizer: ``sgd`` with Nesterov momentum (nnU-Net) or ``adamw`` (Primus).
        lr_encoder, lr_decoder: peak learning rates once pretrained weights arrived; the segmentation layers learn
            at the decoder's.
        lr_scratch: peak learning rate of the whole network when none arrived.
        momentum: of ``sgd``. nnU-Net: 0.99.
        betas: of ``adamw``. Primus: (0.9, 0.98).
        weight_decay: on kernels and matrices; biases, norms, other vectors, tokens and positions are not decayed.
        layer_decay: learning rate factor per Primus block, counted back from the decoder (BEiT, arXiv 2106.08254);
            1 is off, as in OpenMind.
        warmup_share: share of the iterations spent on the linear warm-up. OpenMind: 15 of 150 epochs.
        freeze_share: share in which ``sawtooth`` trains the decoder alone. OpenMind: 15 of 150 epochs.
        freeze_lr_scale: factor on ``lr_decoder`` meanwhile. OpenMind: 1 for CNNs, 0.01 to 0.1 for Primus.
        gradient_clip: largest gradient norm, at most nnU-Net's 12. Primus: 1.
        epochs: intervals between two validations and log lines.
        iterations_per_epoch: nnU-Net: 250.
        val_iterations_per_epoch: batches of the pseudo Dice. nnU-Net: 50.
        save_every: epochs between two resumable checkpoints. nnU-Net: 50.
        batch_size: overrides the plans'; None keeps theirs.
        deep_supervision: losses at the coarser decoder levels too. nnU-Net: on for U-Nets, off for Primus.
        oversample_foreground: share of each batch centred on foreground. nnU-Net: 0.33.
        mirroring: random flips in training and test-time flips. Off for structures that a flip makes ambiguous
            (hippocampus: 0.79 Dice with, 0.86 without).
        spatial_augmentation: nnU-Net's rotation and scaling.
        intensity_augmentation: nnU-Net's noise, blur, brightness, contrast, resolution and gamma.
        train_cases: train on this many cases of the fold only; None takes all. Smaller subsets are contained in
            larger ones of the same ``subset_seed``; validation cases stay as they are.
        subset_seed: decides which cases.
        evaluations: how often nnU-Net's final validation is done on the way too: after half of the epochs, a quarter, and so
            on. Each leaves an ``evaluation_epoch_N.json`` in the fold's folder.
        seed: decides the initial weights, and batches and augmentation when ``nnUNet_n_proc_DA=0`` (worker processes
            deliver in no fixed order).
        threads: of torch on a CPU; None takes OMP_NUM_THREADS, which ``nnUNetv2_train -device cpu`` ignores.
    """

    schedule: Literal["warmup_poly", "frozen", "sawtooth"] = "warmup_poly"
    transfer: Literal["encoder", "decoder", "both"] = "both"
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr_encoder: float = 1e-3
    lr_decoder: float = 1e-3
    lr_scratch: float = 1e-2
    momentum: float = 0.99
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 3e-5
    layer_decay: float = 1.0
    warmup_share: float = 0.1
    freeze_share: float = 0.1
    freeze_lr_scale: float = 1.0
    gradient_clip: float = 12.0
    epochs: int = 150
    iterations_per_epoch: int = 250
    val_iterations_per_epoch: int = 50
    save_every: int = 10
    batch_size: int | None = None
    deep_supervision: bool = True
    oversample_foreground: float = 0.33
    mirroring: bool = True
    spatial_augmentation: bool = True
    intensity_augmentation: bool = True
    train_cases: int | None = None
    subset_seed: int = 0
    evaluations: int = 0
    seed: int = 0
    threads: int | None = None

    @property
    def total_iterations(self) -> int:
        """Optimiser steps of the whole run."""
        return self.epochs * self.iterations_per_epoch

    @property
    def evaluated_epochs(self) -> list[int]:
        """Epochs, counted from 1, after which the validation cases are predicted; the last one is nnU-Net's own affair."""
        halves = {self.epochs // 2**k for k in range(1, self.evaluations + 1)}
        return sorted(halves - {0})


PRIMUS = FinetuneSettings(
    optimizer="adamw",
    lr_encoder=1e-4,
    lr_decoder=1e-4,
    lr_scratch=3e-4,
    weight_decay=5e-2,
    freeze_lr_scale=0.1,
    gradient_clip=1.0,
    deep_supervision=False,
)
RESENC = FinetuneSettings()
# the SimSiam thesis' fine-tuning of MONAI's Swin UNETR: AdamW 1e-3 with torch's betas, weight decay 1e-5, from scratch the same
SWIN = FinetuneSettings(
    optimizer="adamw", lr_scratch=1e-3, betas=(0.9, 0.999), weight_decay=1e-5, deep_supervision=False
)

# The small presets train for CPU minutes, where nnU-Net's SGD at 1e-2 is hopeless (hippocampus, 450 iterations: 0.36 Dice
# against 0.86 with AdamW) and, with 20 labelled cases, augmentation gives nothing (0.86 with and without). With one case it
# does: docs/hippocampus.md.
_SMALL: dict[str, Any] = {
    "optimizer": "adamw",
    "epochs": 15,
    "iterations_per_epoch": 20,
    "val_iterations_per_epoch": 4,
    "save_every": 1,
    "mirroring": False,
    "spatial_augmentation": False,
    "intensity_augmentation": False,
}
# Measured after 60 iterations, one run each. ResEncTiny, 20 labelled cases, from scratch: 0.69 Dice at 2e-3, 0.83 at 5e-3,
# 0.86 at 1e-2. PrimusTiny, 5 labelled cases, 16 evaluation crops: what counts is clipping, because the first gradients,
# which only learn how rare foreground is, otherwise dominate AdamW's second moment for most of the run: from an MAE
# checkpoint 0.55 when clipped to 1, 0.67 to 0.1, 0.67 to 0.01; from scratch 0.16 at 3e-3 clipped to 1, 0.47 at 3e-3, 0.61
# at 5e-3 and 0.60 at 1e-2 clipped to 0.1.
_SMALL_RATES: dict[str, dict[str, Any]] = {
    "unet": {"lr_encoder": 1e-2, "lr_decoder": 1e-2, "lr_scratch": 1e-2},
    "primus": {
        "lr_encoder": 3e-3,
        "lr_decoder": 1e-2,
        "lr_scratch": 5e-3,
        "gradient_clip": 0.1,
        "warmup_share": 0.02,
    },
}


def default_settings(backbone: Backbone, preset: str = "") -> FinetuneSettings:
    """Defaults of a backbone family; presets ending in ``Tiny`` get those for minutes on a CPU."""
    base = {"primus": PRIMUS, "unet": RESENC, "swin": SWIN}[backbone]
    return replace(base, **_SMALL, **_SMALL_RATES[backbone]) if preset.endswith("Tiny") else base


def backbone_of(plans: dict[str, Any], configuration: str) -> Backbone:
    """The family of the network that these plans build."""
    found = configuration_of(plans, configuration)
    name = found["architecture"]["network_class_name"].rsplit(".", 1)[-1]
    if "Swin" in name:
        return "swin"
    return "primus" if "Primus" in name else "unet"


def read_settings(plans: dict[str, Any], configuration: str) -> FinetuneSettings:
    """The backbone's defaults, overridden by the block ``nnssl_finetuning`` of the plans.

    Raises:
        NnsslError: a setting that does not exist (answered with the nearest name) or a value it cannot have.
    """
    preset = configuration_of(plans, configuration).get("nnssl", {}).get("preset", "")
    known = {field.name for field in fields(FinetuneSettings)}
    annotations = get_type_hints(FinetuneSettings)
    block = {}
    for name, value in plans.get(BLOCK, {}).items():
        if name not in known:
            raise unknown_name(f"fine-tuning setting (plans block {BLOCK})", name, known)
        block[name] = _typed(name, value, annotations[name])
    backbone = backbone_of(plans, configuration)
    settings = replace(default_settings(backbone, preset), **block)
    _check(settings)
    if settings.layer_decay != 1 and backbone != "primus":
        raise NnsslError(
            f"fine-tuning setting layer_decay is {settings.layer_decay}",
            f"only a Primus has blocks; set it to 1 (plans block {BLOCK})",
        )
    return settings


def _typed(name: str, value: Any, annotation: Any) -> Any:
    """`value`, as JSON gives it, in the type of its field."""
    choices = get_args(annotation)
    if get_origin(annotation) is Literal:
        if value not in choices:
            raise unknown_name(f"value of the fine-tuning setting {name}:", str(value), choices)
        return value
    if get_origin(annotation) in (Union, UnionType):
        return None if value is None else _typed(name, value, choices[0])
    if get_origin(annotation) is tuple:
        if isinstance(value, (list, tuple)) and len(value) == len(choices):
            return tuple(_typed(name, v, c) for v, c in zip(value, choices, strict=True))
    elif annotation is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif type(value) is annotation:
        return value
    wanted = getattr(annotation, "__name__", str(annotation))
    raise NnsslError(f"fine-tuning setting {name} is {value!r}, not {wanted}", f"correct it in the plans block {BLOCK}")


def _check(settings: FinetuneSettings) -> None:
    """Refuse values out of range, by name."""

    def need(name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise NnsslError(
                f"fine-tuning setting {name} is {getattr(settings, name)}", f"it must be {rule} (plans block {BLOCK})"
            )

    for name in ("epochs", "iterations_per_epoch", "val_iterations_per_epoch", "save_every"):
        need(name, getattr(settings, name) >= 1, "at least 1")
    for name in ("batch_size", "train_cases", "threads"):
        value = getattr(settings, name)
        need(name, value is None or value >= 1, "at least 1, or null")
    need("evaluations", settings.evaluations >= 0, "0 or more")
    for name in ("lr_encoder", "lr_decoder", "lr_scratch", "weight_decay", "freeze_lr_scale"):
        need(name, getattr(settings, name) >= 0, "0 or more")
    for name in ("warmup_share", "freeze_share", "oversample_foreground"):
        need(name, 0 <= getattr(settings, name) <= 1, "between 0 and 1")
    need("layer_decay", 0 < settings.layer_decay <= 1, "above 0 and at most 1")
    need("gradient_clip", 0 < settings.gradient_clip <= 12, "above 0 and at most 12, which nnU-Net applies anyway")
    if settings.schedule == "sawtooth":
        need("warmup_share", settings.warmup_share + settings.freeze_share <= 1, "at most 1 together with freeze_share")
    need("momentum", 0 <= settings.momentum < 1, "from 0 to below 1")
    need("betas", all(0 <= beta < 1 for beta in settings.betas), "from 0 to below 1")
    for name in ("seed", "subset_seed"):
        need(name, getattr(settings, name) >= 0, "0 or more")
