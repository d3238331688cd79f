"""The networks of self-distillation (DINO, iBOT, DINOv2): a student with heads, its EMA teacher, and their passes.

Letters: V crops of a case, the G global ones first, B cases, K prototypes for crops and P for tokens, N hidden tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nnssl_ext.contracts import Backbone, OptimRule, Progress, TokenBackbone
from nnssl_ext.errors import NnsslError
from nnssl_ext.networks.dino_head import DINOHead, HeadSettings
from nnssl_ext.networks.layers import layer_decay_rules, set_stochastic_depth
from nnssl_ext.networks.teacher import EMATeacher, weight_distance
from nnssl_ext.networks.watched import watched_places
from nnssl_ext.objectives.centring import Centring, TeacherTargets
from nnssl_ext.objectives.dino import teacher_figures
from nnssl_ext.objectives.ibot import hidden_tokens
from nnssl_ext.records import Features, Size, View

DENSE_STRIDE = 8
"""Voxels per place of the feature map that a convolutional backbone predicts hidden places on, at most: Primus's token."""


@dataclass(frozen=True)
class TeacherSettings:
    """How the teacher follows and speaks. Schedules advance with every optimiser step.

    Attributes:
        momentum: share of the teacher's weights that a step keeps, from start to end by a cosine.
        temperature: of the teacher's softmax, from start to end linearly, then constant; the same for crops and tokens.
        temperature_warmup: length of that rise: share of all optimiser steps, or their number from 1 on.
        centring, patch_centring: what keeps its probabilities balanced; see `nnssl_ext.objectives.centring`.
        centre_momentum: share of the centre that a step keeps.
    """

    momentum: tuple[float, float] = (0.992, 1.0)
    temperature: tuple[float, float] = (0.04, 0.07)
    temperature_warmup: float = 0.3
    centring: Centring = "sinkhorn"
    patch_centring: Centring = "sinkhorn"
    centre_momentum: float = 0.9

    def momentum_at(self, progress: Progress) -> float:
        """Momentum of the step after ``progress.step`` steps."""
        start, end = self.momentum
        return end - (end - start) * 0.5 * (1 + math.cos(math.pi * progress.step / progress.total))

    def temperature_at(self, progress: Progress) -> float:
        """Temperature of that step."""
        start, end = self.temperature
        steps = self.temperature_warmup * (progress.total if self.temperature_warmup < 1 else 1)
        return end if progress.step >= steps else start + (end - start) * progress.step / steps


@dataclass(frozen=True)
class HiddenTokens:
    """Logits at the tokens that were hidden from the student, and `nnssl_ext.objectives.ibot.hidden_tokens`' weights."""

    student: Float[Tensor, "N P"]
    teacher: Float[Tensor, "N P"]
    weights: Float[Tensor, " N"]


@dataclass(frozen=True)
class Passes:
    """What student and teacher say about one step's crops.

    Attributes:
        student: logits of all crops, the global ones as masked.
        teacher: logits of the global crops, whole.
        hidden: the same for hidden tokens, if tokens are predicted.
        summaries, teacher_summaries: backbone features of the global crops, before the head.
        teacher_map: the teacher's backbone features, place by place.
    """

    student: Float[Tensor, "V B K"]
    teacher: Float[Tensor, "G B K"]
    hidden: HiddenTokens | None
    summaries: Float[Tensor, "G B C"]
    teacher_summaries: Float[Tensor, "G B C"]
    teacher_map: Float[Tensor, "GB D z y x"]


class StudentTeacher(nn.Module):
    """Base of the self-distillation methods.

    Args:
        backbone: the student's.
        global_views: G.
        head: size of each head.
        teacher: see there.
        tokens: whether hidden tokens are predicted.
        share_head: whether one head serves crops and tokens.
        drop_path: rate of stochastic depth in every block of the student; None = as the network has it.

    Raises:
        NnsslError: one head for features of different widths; stochastic depth without blocks.
    """

    temperature: Float[Tensor, ""]
    momentum: Float[Tensor, ""]
    distance: Float[Tensor, ""]

    def __init__(
        self,
        backbone: Backbone,
        global_views: int,
        head: HeadSettings,
        teacher: TeacherSettings,
        tokens: bool,
        share_head: bool = False,
        drop_path: float | None = None,
    ) -> None:
        super().__init__()
        self.global_views = global_views
        self.teacher_settings = teacher
        self.backbone = backbone
        self.dense_level = dense_level(backbone)
        self.predicts_tokens = tokens
        width, dense_width = backbone.channels[-1], backbone.channels[self.dense_level]
        if tokens and share_head and width != dense_width:
            raise NnsslError(
                f"one head cannot serve crops ({width} channels) and places ({dense_width} channels)",
                "set --no_share_head",
            )
        self.head = DINOHead(width, head)
        self.patch_head = DINOHead(dense_width, head) if tokens and not share_head else None
        self.token_head = "head" if self.patch_head is None else "patch_head"
        if drop_path is not None:
            set_stochastic_depth(backbone, drop_path)
        if isinstance(backbone, TokenBackbone):
            backbone.mask_token.requires_grad_(tokens)
        self.teacher = EMATeacher(self.student())
        self.crop_targets = TeacherTargets(head.prototypes, teacher.centring, teacher.centre_momentum)
        self.token_targets = TeacherTargets(head.prototypes, teacher.patch_centring, teacher.centre_momentum)
        self.pretrained_prefixes = backbone.encoder_prefixes
        # what follows a schedule is filled in place, so that a compiled step need not be compiled again
        for name, start in (
            ("temperature", teacher.temperature[0]),
            ("momentum", teacher.momentum[0]),
            ("distance", 0.0),
        ):
            self.register_buffer(name, torch.tensor(start), persistent=False)

    def student(self) -> nn.ModuleDict:
        """What the teacher is a copy of."""
        parts = {"backbone": self.backbone, "head": self.head, "patch_head": self.patch_head}
        return nn.ModuleDict({name: cast(nn.Module, part) for name, part in parts.items() if part is not None})

    @property
    def teacher_backbone(self) -> Backbone:
        """The teacher's backbone."""
        return cast(Backbone, self.teacher.parts["backbone"])

    def rules(self, layer_decay: float, stem_scale: float, frozen_steps: int) -> tuple[OptimRule, ...]:
        """Layer-wise rates of the backbone, and a last layer of the heads that rests at first."""
        decay = layer_decay_rules(self.backbone, "backbone.", layer_decay, stem_scale)
        heads = [name for name in ("head", "patch_head") if getattr(self, name) is not None]
        return (*decay, *(OptimRule(f"{name}.last_layer.", frozen_steps=frozen_steps) for name in heads))

    def passes(self, views: tuple[View, ...]) -> Passes:
        """One pass of the student over masked global and over local crops, one of the teacher over whole global crops."""
        shown, local = views[: self.global_views], views[self.global_views :]
        crops = torch.cat([view.voxels for view in shown])
        mask = torch.cat([_mask(view) for view in shown]) if self.predicts_tokens else None
        seen = self.backbone.forward_features(crops, mask)
        summaries = [seen.summary]
        if local:
            summaries.append(self.backbone.forward_features(torch.cat([view.voxels for view in local])).summary)
        with torch.no_grad():
            known = self.teacher_backbone.forward_features(crops)
            teacher_logits = self.teacher.parts["head"](known.summary)
        return Passes(
            student=self.head(torch.cat(summaries)).unflatten(0, (len(views), -1)),
            teacher=teacher_logits.unflatten(0, (self.global_views, -1)),
            hidden=None if mask is None else self._hidden(seen, known, mask),
            summaries=seen.summary.unflatten(0, (self.global_views, -1)),
            teacher_summaries=known.summary.unflatten(0, (self.global_views, -1)),
            teacher_map=known.levels[self.dense_level],
        )

    def _hidden(self, seen: Features, known: Features, mask: Bool[Tensor, "C z y x"]) -> HiddenTokens:
        """Only hidden tokens go through the heads: all of them would need gigabytes."""
        ids, weights = (each.to(seen.summary.device, non_blocking=True) for each in hidden_tokens(mask))
        student, teacher = (
            features.levels[self.dense_level].movedim(1, -1).flatten(0, -2).index_select(0, ids)
            for features in (seen, known)
        )
        with torch.no_grad():
            teacher_logits = self.teacher.parts[self.token_head](teacher)
        return HiddenTokens(getattr(self, self.token_head)(student), teacher_logits, weights)

    def figures(
        self,
        dino: Float[Tensor, ""],
        crops: Float[Tensor, "G B K"],
        tokens: Float[Tensor, "N P"] | None,
    ) -> dict[str, Float[Tensor, ""]]:
        """What to log beside the losses, given the teacher's probabilities; see `teacher_figures`, and ``momentum``,
        ``teacher_temperature``, ``teacher_distance``: `weight_distance` of the backbones when the step began."""
        return {
            **teacher_figures(dino, crops, tokens),
            "momentum": self.momentum.clone(),
            "teacher_temperature": self.temperature.clone(),
            "teacher_distance": self.distance.clone(),
        }

    def watch(
        self, passes: Passes, crops: Float[Tensor, "G B K"], tokens: Float[Tensor, "N P"] | None
    ) -> dict[str, Tensor]:
        """What monitors look at: see `nnssl_ext.records.Step`."""
        watched = {
            "features": passes.teacher_summaries.flatten(0, 1),
            "prototypes": crops.mean(dim=(0, 1)),
            "tokens": watched_places(passes.teacher_map),
        }
        if tokens is not None and len(tokens):
            watched["patch_prototypes"] = tokens.mean(dim=0)
        return {name: value.detach() for name, value in watched.items()}

    def before_step(self, progress: Progress) -> None:
        """Follow the schedules; forget what an unfinished step saw."""
        self.temperature.fill_(self.teacher_settings.temperature_at(progress))
        self.momentum.fill_(self.teacher_settings.momentum_at(progress))
        self.distance.copy_(weight_distance(self.teacher.parts["backbone"], self.student()["backbone"]))
        for targets in (self.crop_targets, self.token_targets):
            targets.before_step()

    def after_step(self, progress: Progress) -> None:
        """Move teacher and centres, once per optimiser step."""
        done = Progress(progress.step - 1, progress.total)
        self.teacher.move(self.student(), self.teacher_settings.momentum_at(done))
        for targets in (self.crop_targets, self.token_targets):
            targets.after_step()

    def export_backbone(self) -> Backbone:
        """The teacher's, which DINO finds better than the student's throughout training (its Fig. 6)."""
        return self.teacher_backbone


def dense_level(backbone: Backbone) -> int:
    """The feature map whose places stand for tokens: the coarsest of at most 8 voxels per place, else the finest."""
    fine = [level for level, stride in enumerate(backbone.strides) if max(stride) <= DENSE_STRIDE]
    return fine[-1] if fine else 0


def mask_cell(backbone: Backbone) -> Size:
    """Voxels per cell of masks: a token, or a place of that feature map."""
    return backbone.token_size or backbone.strides[dense_level(backbone)]


def _mask(view: View) -> Bool[Tensor, "B z y x"]:
    assert view.mask is not None, "where tokens are predicted, global views carry masks"
    return view.mask
