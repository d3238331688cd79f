"""Checkpoints of ``nnUNetv2_train``: segmentation models, whose weights came from labels."""

from __future__ import annotations

from typing import Any

from nnssl_ext.checkpoints.pretrained import Pretrained
from nnssl_ext.errors import NnsslError
from nnssl_ext.plans import configuration_of


def from_nnunet(content: dict[str, Any], origin: str) -> Pretrained:
    """A segmentation model of nnU-Net.

    Raises:
        NnsslError: the file or its plans are of an nnU-Net that did not yet describe networks in them.
    """
    plans, configuration = (content["init_args"].get(key) for key in ("plans", "configuration"))
    if not isinstance(plans, dict):
        raise NnsslError(f"{origin} does not say how its network is built", "use a checkpoint of nnU-Net 2.2 or newer")
    found = configuration_of(plans, configuration)
    if "architecture" not in found:
        raise NnsslError(f"{origin} has plans of an old nnU-Net", "use a checkpoint of nnU-Net 2.5 or newer")
    return Pretrained(
        origin=origin,
        kind="nnunet",
        method=str(content.get("trainer_name", "nnU-Net")),
        weights=content["network_weights"],
        not_pretrained=frozenset(),
        architecture=found["architecture"],
        preset=found.get("nnssl", {}).get("preset", ""),
        input_channels=len(found["normalization_schemes"]),
        patch_size=tuple(found["patch_size"]),
        spacing=None,
        normalization_schemes=tuple(found["normalization_schemes"]),
        batch_size=int(found["batch_size"]),
        citations=[],
        about={},
    )
