"""DINOv2 in 3D: self-distillation of crops and of hidden tokens, with features spread evenly.

A student sees two large crops of a case, in one of which tokens are hidden, and eight small ones. A teacher, which follows the
student by a moving average, sees the large crops whole. From every crop the student predicts what the teacher says about the
other large crops (DINO, Caron et al., arXiv:2104.14294); at hidden tokens, what the teacher says about these (iBOT, Zhou et al.,
arXiv:2111.07832); and its features of different cases are pushed apart (KoLeo, Sablayrolles et al., arXiv:1806.03198):
``loss = DINO + iBOT + 0.1 KoLeo``, as in DINOv2 (Oquab et al., arXiv:2304.07193), in 3D as in 3DINO (Xu et al.,
arXiv:2501.11755).

On tokens (Primus) a crop's feature is the class token, or without one the mean token. On convolutions (ResEnc) it is the
pooled bottleneck; blocks of voxels are hidden, and what is predicted there are the places of a feature map.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Shaped
from torch import Tensor

from nnssl_ext.contracts import Backbone, PretrainPlan
from nnssl_ext.engine.settings import OptimSettings
from nnssl_ext.networks.dino_head import HeadSettings
from nnssl_ext.networks.student_teacher import StudentTeacher, TeacherSettings, mask_cell
from nnssl_ext.objectives.dino import dino_loss
from nnssl_ext.objectives.ibot import ibot_loss
from nnssl_ext.objectives.koleo import koleo_loss
from nnssl_ext.records import Step, View
from nnssl_ext.reports.feature_pca import feature_pictures
from nnssl_ext.views.crop_settings import CropSettings

SINKHORN_CASES, KOLEO_CASES = 32, 8
"""Cases per step and process below which crops are too few for Sinkhorn-Knopp to balance, and neighbours too few to be near
(our choice)."""
OPTIM = OptimSettings(
    lr=2e-3,
    lr_scaling="sqrt",
    lr_batch=1024,
    weight_decay=0.04,
    weight_decay_end=0.4,
    betas=(0.9, 0.999),
    schedule="cosine",
    warmup=0.1,
    clip=3.0,
    clip_by="module",
)
"""DINOv2's and 3DINO's."""


@dataclass(frozen=True)
class DINO3DSettings:
    """Settings of `DINO3DTrainer`. The defaults are 3DINO's, which trained with 512 cases per step.

    Attributes:
        epochs, iterations: 500 x 250 = 125,000 optimiser steps; an epoch is the interval of logging.
        crops: crops, masks and augmentations.
        head: of the head for crops and, unless shared, of another for tokens.
        teacher: momentum, temperature, centring.
        student_temperature: of the student's softmax.
        ibot_weight, koleo_weight: of these terms; 0 = without.
        share_head: one head for crops and tokens.
        drop_path: stochastic depth, the same in all blocks; None = as the plans' network has it.
        layer_decay, stem_scale: factors on the learning rate from a layer to the one before, and of the stem (DINOv2).
        freeze_last_layer: optimiser steps during which the heads' last layers rest.
        optim: optimiser and schedules.
    """

    epochs: int = 500
    iterations: int = 250
    crops: CropSettings = field(default_factory=CropSettings)
    head: HeadSettings = field(default_factory=HeadSettings)
    teacher: TeacherSettings = field(default_factory=TeacherSettings)
    student_temperature: float = 0.1
    ibot_weight: float = 1.0
    koleo_weight: float = 0.1
    share_head: bool = False
    drop_path: float | None = None
    layer_decay: float = 0.9
    stem_scale: float = 0.2
    freeze_last_layer: int = 1250
    optim: OptimSettings = OPTIM

    @classmethod
    def for_plan(cls, plan: PretrainPlan) -> DINO3DSettings:
        """3DINO's recipe for full presets, without what a small batch cannot carry; short runs for the Tiny presets."""
        if plan.preset.endswith("Tiny"):
            # Measured on hippocampus, 8 cases per step. At .04 and a momentum of .996 the teacher's entropy rose to .93 of ln K
            # by step 150, before the student had learned what views share; at .02 and .998 to .72, and then fell. Later the
            # teacher has to follow faster, not slower as in long runs: after 1000 steps towards 1.0 the linear probe gave .26
            # of the teacher and .39 of the student.
            return cls(
                epochs=40,
                iterations=25,
                crops=CropSettings.small(plan),
                head=HeadSettings(prototypes=1024, hidden=512, bottleneck=64),
                teacher=TeacherSettings(momentum=(0.998, 0.99), temperature=(0.02, 0.02), centring="centre"),
                koleo_weight=0.0,
                layer_decay=1.0,
                stem_scale=1.0,
                freeze_last_layer=100,
                optim=replace(OPTIM, lr=1e-3, lr_scaling="none", weight_decay_end=None, warmup=0.05, betas=(0.9, 0.95)),
            )
        numbered = not plan.preset.startswith("Swin")  # whether its layers have numbers to decay rates over
        return cls(
            teacher=TeacherSettings(centring="sinkhorn" if plan.batch_size >= SINKHORN_CASES else "centre"),
            koleo_weight=0.1 if plan.batch_size >= KOLEO_CASES else 0.0,
            drop_path=0.3 if plan.preset.startswith("Primus") else None,
            layer_decay=0.9 if numbered else 1.0,
            stem_scale=0.2 if numbered else 1.0,
        )


class DINO3DTrainer(StudentTeacher):
    """The method; see the module's head.

    Args:
        settings: what to do.
        backbone: whose encoder to train.
        plan: sizes of the crops.

    Raises:
        NnsslError: settings that do not fit the backbone; while training, KoLeo with batches of one.
    """

    settings_type = DINO3DSettings
    citations = (
        "Caron et al. Emerging Properties in Self-Supervised Vision Transformers. ICCV 2021. arXiv:2104.14294",
        "Zhou et al. iBOT: Image BERT Pre-Training with Online Tokenizer. ICLR 2022. arXiv:2111.07832",
        "Oquab et al. DINOv2: Learning Robust Visual Features without Supervision. TMLR 2024. arXiv:2304.07193",
        "Xu et al. A generalizable 3D framework and model for self-supervised learning in medical imaging. arXiv:2501.11755",
    )

    def __init__(self, settings: DINO3DSettings, backbone: Backbone, plan: PretrainPlan) -> None:
        super().__init__(
            backbone,
            settings.crops.global_views,
            settings.head,
            settings.teacher,
            tokens=settings.ibot_weight > 0,
            share_head=settings.share_head,
            drop_path=settings.drop_path,
        )
        self.settings = settings
        self.view_policy = settings.crops.policy(plan, mask_cell(backbone) if settings.ibot_weight > 0 else None)
        self.optim_rules = self.rules(settings.layer_decay, settings.stem_scale, settings.freeze_last_layer)

    def forward(self, views: tuple[View, ...]) -> Step:
        """The three terms of one step."""
        settings, passes = self.settings, self.passes(views)
        targets = self.crop_targets(passes.teacher, self.temperature)
        terms = {"dino": dino_loss(passes.student, targets, settings.student_temperature)}
        token_targets = None
        if passes.hidden is not None:
            hidden = passes.hidden
            token_targets = self.token_targets(hidden.teacher, self.temperature)
            crops = passes.teacher.shape[:2].numel()
            terms["ibot"] = ibot_loss(
                hidden.student, token_targets, hidden.weights, crops, settings.student_temperature
            )
        if settings.koleo_weight > 0:
            terms["koleo"] = koleo_loss(passes.summaries)
        weights = {"dino": 1.0, "ibot": settings.ibot_weight, "koleo": settings.koleo_weight}
        parts = {name: weights[name] * term for name, term in terms.items()}
        return Step(
            loss=torch.stack(list(parts.values())).sum(),
            terms={name: term.detach() for name, term in terms.items()}
            | self.figures(terms["dino"], targets, token_targets),
            watch=self.watch(passes, targets, token_targets),
            parts=parts,
        )

    def pictures(self, views: tuple[View, ...]) -> dict[str, Shaped[Tensor, "B _C _Z _Y _X"]]:
        """The large crops, and the teacher's features of them as colours."""
        return feature_pictures(self.teacher_backbone, views[: self.global_views], self.dense_level)
