"""From plans to networks, exactly as nnU-Net builds them, and to backbones."""

from __future__ import annotations

import pydoc
import re
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

NETWORKS = frozenset(
    {
        "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
        "nnssl_ext.networks.primus.SegmentationPrimus",
        "nnssl_ext.networks.swin_unetr.SegmentationSwinUNETR",
    }
)
"""What is built. Plans may come from a stranger's checkpoint, and nnU-Net imports and calls whatever they name."""


def build_network(
    plans: dict[str, Any], configuration: str, input_channels: int, num_classes: int, deep_supervision: bool = False
) -> nn.Module:
    """The segmentation network that nnU-Net builds from these plans, initialised as nnU-Net initialises it.

    Raises:
        NnsslError: unknown configuration, a network that is none of `NETWORKS` or has parts that are not torch's, or a network
            class that is not installed.
    """
    architecture = configuration_of(plans, configuration)["architecture"]
    name = architecture["network_class_name"]
    _refuse_foreign(architecture, plans["plans_name"])
    try:
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
        NnsslError: as `build_network`.
    """
    network = build_network(plans, configuration, input_channels, num_classes)
    if isinstance(network, ResidualEncoderUNet | PlainConvUNet):
        return ResEncBackbone(network)
    if isinstance(network, SegmentationSwinUNETR):
        return cast(
            Backbone, SwinBackbone(network, input_channels)
        )  # its `network` is more specific than the contract's

    from nnssl_ext.networks.primus_backbone import PrimusBackbone  # imports timm, which the others do not need

    return cast(Backbone, PrimusBackbone(cast(Any, network)))  # what is left of `NETWORKS`


def _refuse_foreign(architecture: dict[str, Any], origin: str) -> None:
    """Nothing that the plans name is imported or called before it is known to be a network of ours or a layer of torch's."""
    name = architecture["network_class_name"]
    if name not in NETWORKS:
        raise NnsslError(
            f"{origin}: the plans name the network {name}, which is not known here; nothing of it was imported",
            "use plans of one of our planners (nnsslPlannerPrimusM, nnsslPlannerResEncL, ...) or of nnU-Net's U-Net planners",
        )
    for argument in architecture["_kw_requires_import"]:
        part = architecture["arch_kwargs"].get(argument)
        if part is not None and not _is_layer(part):
            raise NnsslError(
                f"{origin}: the plans name {part} as {argument} of the network, which is no layer of torch.nn",
                "use plans that name torch's layers, as nnU-Net's planners do",
            )


def _is_layer(name: Any) -> bool:
    if not isinstance(name, str) or not re.fullmatch(r"torch\.nn(\.modules\.\w+)?\.[A-Z]\w*", name):
        return False
    found = pydoc.locate(name)
    return isinstance(found, type) and issubclass(found, nn.Module)
