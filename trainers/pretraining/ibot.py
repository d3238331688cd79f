"""iBOT in 3D: masked modelling with a tokenizer that is learnt along (Zhou et al., arXiv:2111.07832).

A student sees two large crops of a case, in one of which blocks of tokens are hidden, and small ones. A teacher, which follows
the student by a moving average, sees the large crops whole. At hidden tokens the student predicts the teacher's probabilities
of the same tokens (masked image modelling, Eq. 2); from every crop it predicts the teacher's probabilities of the other large
crops (DINO, Eq. 1). One head serves crops and tokens; ``loss = DINO + iBOT``.

On tokens (Primus) a crop's feature is the class token, or without one the mean token. On convolutions (ResEnc) it is the
pooled bottleneck; blocks of voxels are hidden, what is predicted there are the places of a feature map, and the two have a
head each, because their widths differ.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from jaxtyping import Shaped
from torch import Tensor

from nnssl_ext.contracts import Backbone, PretrainPlan
from nnssl_ext.engine.settings import OptimSettings
from nnssl_ext.networks.dino_head import HeadSettings
from nnssl_ext.networks.student_teacher import StudentTeacher, TeacherSettings, mask_cell
from nnssl_ext.objectives.dino import dino_loss
from nnssl_ext.objectives.ibot import ibot_loss
from nnssl_ext.records import Step, View
from nnssl_ext.reports.feature_pca import feature_pictures
from nnssl_ext.views.crop_settings import CropSettings

OPTIM = OptimSettings(
    lr=5e-4,
    lr_scaling="linear",
    lr_batch=256,
    weight_decay=0.04,
    weight_decay_end=0.4,
    betas=(0.9, 0.999),
    schedule="cosine",
    warmup=0.0125,
    clip=3.0,
    clip_by="parameter",
)
"""The paper's, with its warm-up of 10 in 800 epochs."""


@dataclass(frozen=True)
class IBOTSettings:
    """Settings of `IBOTTrainer`. The defaults are those of the paper's released ViT-S/16, trained for 800 epochs (a million
    steps) with 1,024 images per step, where nothing else is said.

    Attributes:
        epochs, iterations: 1000 x 250 optimiser steps, the length of our other methods; an epoch is the interval of logging.
        crops: two large crops, in half of which blocks hide 10 to 50 % of the tokens, and ten small ones; scales are 3DINO's.
        head: 8,192 prototypes.
        share_head: one head for crops and tokens.
        teacher: its temperature rises over 30 in 800 epochs; centres, not Sinkhorn-Knopp.
        student_temperature: of the student's softmax.
        drop_path: stochastic depth, the same in all blocks; None = as the plans' network has it.
        freeze_last_layer: optimiser steps during which the heads' last layers rest: one epoch.
        optim: optimiser and schedules.
    """

    epochs: int = 1000
    iterations: int = 250
    crops: CropSettings = field(
        default_factory=lambda: CropSettings(local_views=10, mask_ratio=(0.1, 0.5), mask_shape="block")
    )
    head: HeadSettings = field(default_factory=lambda: HeadSettings(prototypes=8192))
    share_head: bool = True
    teacher: TeacherSettings = field(
        default_factory=lambda: TeacherSettings(
            momentum=(0.996, 1.0), temperature_warmup=0.0375, centring="centre", patch_centring="centre"
        )
    )
    student_temperature: float = 0.1
    drop_path: float | None = None
    freeze_last_layer: int = 1250
    optim: OptimSettings = OPTIM

    @classmethod
    def for_plan(cls, plan: PretrainPlan) -> IBOTSettings:
        """The paper's recipe for full presets, short runs for the Tiny ones; two heads on convolutions."""
        share_head = plan.preset.startswith("Primus")
        if plan.preset.endswith("Tiny"):
            # Teacher and rate: see `DINO3DSettings.for_plan`.
            return cls(
                epochs=40,
                iterations=25,
                crops=CropSettings.small(plan, mask_ratio=(0.1, 0.5), mask_shape="block"),
                head=HeadSettings(prototypes=1024, hidden=512, bottleneck=64),
                share_head=share_head,
                teacher=TeacherSettings(
                    momentum=(0.998, 0.99), temperature=(0.02, 0.02), centring="centre", patch_centring="centre"
                ),
                freeze_last_layer=100,
                optim=replace(OPTIM, lr=1e-3, lr_scaling="none", weight_decay_end=None, warmup=0.05, betas=(0.9, 0.95)),
            )
        return cls(share_head=share_head)


class IBOTTrainer(StudentTeacher):
    """The method; see the module's head.

    Args:
        settings: what to do.
        backbone: whose encoder to train.
        plan: sizes of the crops.

    Raises:
        NnsslError: settings that do not fit the backbone.
    """

    settings_type = IBOTSettings
    citations = ("Zhou et al. iBOT: Image BERT Pre-Training with Online Tokenizer. ICLR 2022. arXiv:2111.07832",)

    def __init__(self, settings: IBOTSettings, backbone: Backbone, plan: PretrainPlan) -> None:
        super().__init__(
            backbone,
            settings.crops.global_views,
            settings.head,
            settings.teacher,
            tokens=True,
            share_head=settings.share_head,
            drop_path=settings.drop_path,
        )
        self.settings = settings
        self.view_policy = settings.crops.policy(plan, mask_cell(backbone))
        self.optim_rules = self.rules(layer_decay=1.0, stem_scale=1.0, frozen_steps=settings.freeze_last_layer)

    def forward(self, views: tuple[View, ...]) -> Step:
        """Both terms of one step."""
        temperature, passes = self.settings.student_temperature, self.passes(views)
        hidden = passes.hidden
        assert hidden is not None
        targets = self.crop_targets(passes.teacher, self.temperature)
        token_targets = self.token_targets(hidden.teacher, self.temperature)
        crops = passes.teacher.shape[:2].numel()
        parts = {
            "dino": dino_loss(passes.student, targets, temperature),
            "ibot": ibot_loss(hidden.student, token_targets, hidden.weights, crops, temperature),
        }
        return Step(
            loss=parts["dino"] + parts["ibot"],
            terms={name: part.detach() for name, part in parts.items()}
            | self.figures(parts["dino"], targets, token_targets),
            watch=self.watch(passes, targets, token_targets),
            parts=parts,
        )

    def pictures(self, views: tuple[View, ...]) -> dict[str, Shaped[Tensor, "B _C _Z _Y _X"]]:
        """The large crops, and the teacher's features of them as colours."""
        return feature_pictures(self.teacher_backbone, views[: self.global_views], self.dense_level)
