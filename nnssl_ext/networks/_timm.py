"""The parts of timm and dynamic-network-architectures that our token networks use.

timm imports torchvision, whose import fails when its compiled half does not fit torch (a CPU torch beside PyPI's torchvision:
``operator torchvision::nms does not exist``). Declaring the two operators it asks for is enough; nothing here calls them.
"""

from __future__ import annotations

import warnings

import torch

try:
    import torchvision  # noqa: F401
except (ImportError, OSError, RuntimeError):
    _operators = torch.library.Library("torchvision", "DEF")  # the declarations live as long as this object
    _operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

with warnings.catch_warnings():
    # timm decorates its models with what recent torch calls deprecated; users of our commands can do nothing about it
    warnings.filterwarnings("ignore", message=".*torch.jit", category=FutureWarning)
    from dynamic_network_architectures.building_blocks.eva import Eva
    from dynamic_network_architectures.building_blocks.patch_encode_decode import PatchEmbed
    from timm.layers import DropPath, build_rotary_pos_embed

__all__ = ["DropPath", "Eva", "PatchEmbed", "build_rotary_pos_embed"]
