"""From plans to networks, exactly as nnU-Net builds them, and to backbones."""

from __future__ import annotations

import pydoc
import warnings
from typing import Any, cast

from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import nn

from nnssl_ext.contracts import Backbone
from nnssl_ext.errors import NnsslError
from nnssl_ext.networks.resenc_backbone import ResEncBackbone
from nnssl_ext.networks.swin_backbone import SwinBackbone
from nnssl_ext.networks.swin_unetr import SegmentationSwinUNETR
from nnssl_ext.plans import configuration_of


def build_network(
    plans: dict[str, Any], configuration: str, input_channels: int, num_classes: int, deep_supervision: bool = False
) -> nn.Module:
    """The segmentation network that nnU-Net builds from these plans, initialised as nnU-Net initialises it.

    Raises:
        NnsslError: unknown configuration, or a network class that is not installed.
    """
    architecture = configuration_of(plans, configuration)["architecture"]
    name = architecture["network_class_name"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nnU-Net warns before it looks a moved class up by its last name
            return get_network_from_plans(
                name,
                architecture["arch_kwargs"],
                architecture["_kw_requires_import"],
                input_channels,
                num_classes,
                allow_init=True,
                deep_supervision=deep_supervision,
            )
    except (ImportError, pydoc.ErrorDuringImport) as error:
        raise NnsslError(
            f"network class {name} of {plans['plans_name']} cannot be imported: {error}",
            "install the package that holds it, or plan with one of our planners (nnssl_plan -h)",
        ) from error


def build_backbone(plans: dict[str, Any], configuration: str, input_channels: int, num_classes: int = 2) -> Backbone:
    """The backbone around that network.

    Raises:
        NnsslError: a network class that pretraining does not know.
    """
    network = build_network(plans, configuration, input_channels, num_classes)
    if isinstance(network, ResidualEncoderUNet | PlainConvUNet):
        return ResEncBackbone(network)
    if isinstance(network, SegmentationSwinUNETR):
        return cast(
            Backbone, SwinBackbone(network, input_channels)
        )  # its `network` is more specific than the contract's

    from nnssl_ext.networks.primus import SegmentationPrimus  # imports timm, which convolutional networks do not need
    from nnssl_ext.networks.primus_backbone import PrimusBackbone

    if isinstance(network, SegmentationPrimus):
        return cast(Backbone, PrimusBackbone(network))
    kind = f"{type(network).__module__}.{type(network).__qualname__}"
    raise NnsslError(
        f"plans {plans['plans_name']} build {kind}, which pretraining does not support",
        "use plans of one of our planners (nnsslPlannerPrimusM, nnsslPlannerResEncL, ...) or of nnU-Net's U-Net planners",
    )
