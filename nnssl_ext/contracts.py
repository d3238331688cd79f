"""The contracts between rooms. Small on purpose: a method or a backbone that keeps one works everywhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from nnssl_ext.records import Case, Features, Size, Step, View


@dataclass(frozen=True)
class ViewDraw:
    """Everything random about one view of one case, drawn before any voxel is touched.

    Attributes:
        size: voxels of the view along z, y, x.
        affine: ``(4, 4)`` float64, view voxel -> case voxel.
        intensity: augmentation name -> strength, in the order of application; seeds for noise included.
        mask: token-grid mask ``(z, y, x)``, True where masked, or None.
        facts: further figures worth a record, such as the IoU of a pair; they join `View.applied`.
        clean: also keep the voxels as they were before intensity augmentation, as `View.clean`.
    """

    size: Size
    affine: Float[np.ndarray, "4 4"]
    intensity: Mapping[str, float]
    mask: Bool[np.ndarray, "z y x"] | None = None
    facts: Mapping[str, float] = field(default_factory=dict)
    clean: bool = False


@runtime_checkable
class ViewPolicy(Protocol):
    """Draws the views of one case. Frozen, picklable, without torch state: it runs in reading workers.

    A policy with a true attribute ``labels`` is also given the labels of its views.
    """

    def draw(self, case: Case, rng: np.random.Generator, quantile: float) -> tuple[ViewDraw, ...]:
        """The views of one sample; every sample of a run has the same number of views with the same sizes.

        Args:
            quantile: uniform on [0, 1) like a draw from `rng`, but stratified: the samples of one step, over all processes,
                have one in each of as many equal intervals, in random order. For what should vary little between steps,
                such as the number of masked tokens.
        """
        ...


@runtime_checkable
class Backbone(Protocol):
    """An encoder (and decoder) around the very network that nnU-Net builds from the plans. An ``nn.Module``.

    Attributes:
        network: the segmentation network; its ``state_dict()`` is what checkpoints hold.
        channels: channels per encoder level, finest first.
        strides: cumulative input voxels per feature voxel along z, y, x, per encoder level, finest first.
        decoder_channels: channels per map of `forward_decoder`, finest first.
        token_size: voxels per token for token backbones, else None.
        divisor: every input size must be a multiple of this.
        encoder_prefixes, decoder_prefixes: parameter-name prefixes in ``network`` of the two halves (the final
            ``.seg_layers.`` belong to neither).
    """

    network: nn.Module
    channels: tuple[int, ...]
    strides: tuple[Size, ...]
    decoder_channels: tuple[int, ...]
    divisor: Size
    encoder_prefixes: tuple[str, ...]
    decoder_prefixes: tuple[str, ...]

    @property
    def token_size(self) -> Size | None: ...

    def forward_features(self, x: Float[Tensor, "B C Z Y X"], mask: Bool[Tensor, "B z y x"] | None = None) -> Features:
        """Encoder features. A mask hides its cells from the encoder: token backbones replace masked tokens by a
        learned mask token before positions are added; convolutional ones set the masked input voxels to 0."""
        ...

    def forward_decoder(self, features: Features) -> Features:
        """Decoder maps of these encoder features, finest first (the finest is what ``.seg_layers.`` reads)."""
        ...


@runtime_checkable
class TokenBackbone(Backbone, Protocol):
    """A backbone made of tokens, which can encode a subset of them. Token order is C order of the token grid.

    Attributes:
        embed_dim, num_heads: width and attention heads of the encoder.
        mask_token: what `forward_features` puts in the place of masked tokens; not exported.
    """

    embed_dim: int
    num_heads: int
    mask_token: nn.Parameter

    @property
    def token_size(self) -> Size: ...

    def forward_visible(
        self, x: Float[Tensor, "B C Z Y X"], mask: Bool[Tensor, "B z y x"]
    ) -> tuple[Float[Tensor, "B V E"], Int[Tensor, "B V"]]:
        """Encode visible tokens only. All samples must hide the same number of tokens.

        Returns:
            The encoded visible tokens (prefix tokens removed) and their flat indices into the token grid.
        """
        ...


@dataclass(frozen=True)
class Progress:
    """Where a run stands: optimiser steps done, and optimiser steps planned."""

    step: int
    total: int


@dataclass(frozen=True)
class OptimRule:
    """How the optimiser treats some parameters of a method. Where several rules match a parameter, all of them apply.

    Attributes:
        prefix: the rule is for the parameters of the method whose names start so.
        lr_scale: factor on the learning rate (layer-wise decay, a slower stem); factors multiply.
        constant: the learning rate ignores the schedule (SimSiam's predictor).
        frozen_steps: optimiser steps at the start of the run during which the learning rate is 0 (DINO's last layer).
    """

    prefix: str
    lr_scale: float = 1.0
    constant: bool = False
    frozen_steps: int = 0


@dataclass(frozen=True)
class HounsfieldScale:
    """What nnU-Net's CTNormalization makes of Hounsfield units: clipped to `lower` and `upper`, then ``(HU - mean) / std``."""

    mean: float
    std: float
    lower: float
    upper: float

    def normalised(self, hu: float) -> float:
        """The normalised intensity of a value, without the clipping."""
        return (hu - self.mean) / max(self.std, 1e-8)


@dataclass(frozen=True)
class PretrainPlan:
    """What a method may know about plans, read from one configuration of a plans file.

    Attributes:
        plans_name, configuration, preset: where it comes from, e.g. nnsslPrimusMPlans, 3d_fullres, PrimusM.
        global_crop, local_crop: voxels, multiples of what the backbone demands.
        batch_size: cases per step and process.
        spacing: target mm, z, y, x.
        channels: image channels.
        hounsfield: per channel, how the plans normalise it where it is a CT that nnU-Net normalises as such, else None.
        token_size: voxels per token, z, y, x, else None.
    """

    plans_name: str
    configuration: str
    preset: str
    global_crop: Size
    local_crop: Size
    batch_size: int
    spacing: tuple[float, float, float]
    channels: int
    hounsfield: tuple[HounsfieldScale | None, ...] = (None,)
    token_size: Size | None = None


@runtime_checkable
class Method(Protocol):
    """A self-supervised method: an ``nn.Module`` built as ``Method(settings, backbone, plan)``.

    All passes of one step run inside one ``forward``, so that DDP and ``torch.compile`` see one graph.

    Class attributes:
        settings_type: the frozen dataclass of its settings, every field with a default. It holds at least ``epochs``,
            ``iterations`` (optimiser steps per epoch, the interval of logging and saving) and ``optim``
            (`nnssl_ext.engine.settings.OptimSettings`), and a classmethod ``for_plan(plan: PretrainPlan)`` that
            returns the defaults for these plans. Where some depend on others, which flags may change, it also has
            ``settled()``, which returns them all decided.
        citations: papers to cite when its checkpoints are used.

    Attributes:
        settings: an instance of ``settings_type``.
        view_policy: what to draw for each case.
        pretrained_prefixes: parameter-name prefixes of the exported network that this method trains.
        optim_rules: exceptions from one learning rate for all parameters.
    """

    settings_type: type
    citations: tuple[str, ...]
    settings: Any
    view_policy: ViewPolicy
    pretrained_prefixes: tuple[str, ...]
    optim_rules: tuple[OptimRule, ...]

    def forward(self, views: tuple[View, ...]) -> Step:
        """One step's loss."""
        ...

    def before_step(self, progress: Progress) -> None:
        """Called once per optimiser step, before its passes: what follows a schedule (temperatures), and forgetting what
        an unfinished step left behind. ``progress.step`` steps are done."""
        ...

    def after_step(self, progress: Progress) -> None:
        """Called once per optimiser step, after the parameters moved (EMA, centres). Not called when a step was skipped."""
        ...

    def export_backbone(self) -> Backbone:
        """The backbone whose network is written to checkpoints (a teacher, where the paper says so)."""
        ...

    def pictures(self, views: tuple[View, ...]) -> dict[str, Shaped[Tensor, "B _C _Z _Y _X"]]:
        """Named volumes worth looking at, without gradient; drawn side by side in this order. Three channels of uint8
        are colours (`nnssl_ext.reports.feature_pca.pca_rgb`)."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...


@runtime_checkable
class Monitor(Protocol):
    """Watches steps and speaks when asked."""

    def see(self, step: Step) -> None:
        """Take note of one step; must not synchronise the device."""
        ...

    def say(self) -> dict[str, float]:
        """Named figures since the last call; forgets what it saw."""
        ...
