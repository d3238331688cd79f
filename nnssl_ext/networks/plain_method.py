"""What methods without a teacher have in common: the backbone they are given is trained, and exported as it is."""

from __future__ import annotations

from torch import nn

from nnssl_ext.contracts import Backbone, OptimRule, Progress, TokenBackbone


class PlainMethod(nn.Module):
    """Base of methods that train one backbone by their loss alone; `nnssl_ext.contracts.Method` but for what a method is.

    Args:
        backbone: what to train.
        pretrained_prefixes: parameter-name prefixes of its network that get a gradient.
        mask_token: whether the method hides tokens from the encoder; else the mask token of a token backbone rests.
    """

    def __init__(self, backbone: Backbone, pretrained_prefixes: tuple[str, ...], mask_token: bool = False) -> None:
        super().__init__()
        self.backbone = backbone
        self.pretrained_prefixes = pretrained_prefixes
        self.optim_rules: tuple[OptimRule, ...] = ()
        if isinstance(backbone, TokenBackbone):
            backbone.mask_token.requires_grad_(mask_token)

    def before_step(self, progress: Progress) -> None:
        """Nothing follows a schedule beside the learning rate."""

    def after_step(self, progress: Progress) -> None:
        """Nothing moves beside the parameters."""

    def export_backbone(self) -> Backbone:
        """The trained backbone itself."""
        return self.backbone
