"""A pretrained network, whoever wrote the file, in the words of our networks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from nnssl_ext.checkpoints.schema import Kind, check
from nnssl_ext.plans import configuration_of


@dataclass(frozen=True)
class Pretrained:
    """Weights and what one must know to use them.

    Attributes:
        origin: the file's name.
        kind: whose checkpoint it was.
        method: name of the pretraining method or trainer.
        weights: network weights, named as in the networks that plans build.
        not_pretrained: names in `weights` that were never trained.
        architecture: as a plans file writes it: network_class_name, arch_kwargs, _kw_requires_import.
        preset: name of the architecture's size, such as PrimusM, or "".
        input_channels: image channels.
        patch_size: voxels z, y, x behind the position table, and the size recommended for fine-tuning.
        spacing: mm z, y, x that a fixed-spacing pretraining used, or None where it followed the data.
        normalization_schemes: nnU-Net's names, one per channel.
        batch_size: cases per step of the plans.
        citations: in nnssl's format.
        about: settings, data and progress, as `schema` has them; nothing of nnssl's data listing, which names patients.
        notes: what the reader had to repair or assume, one sentence each.
        method_state: the pretraining method's own state (heads, teacher, mask token and the network once more), which only
            a ``checkpoint_latest.pth`` of ours holds.
    """

    origin: str
    kind: Kind
    method: str
    weights: dict[str, Tensor]
    not_pretrained: frozenset[str]
    architecture: dict[str, Any]
    preset: str
    input_channels: int
    patch_size: tuple[int, ...]
    spacing: tuple[float, ...] | None
    normalization_schemes: tuple[str, ...]
    batch_size: int
    citations: list[dict[str, Any]]
    about: dict[str, Any]
    notes: tuple[str, ...] = ()
    method_state: dict[str, Tensor] = field(default_factory=dict)

    def __str__(self) -> str:
        network = self.architecture["network_class_name"].rsplit(".", 1)[-1]
        size = "x".join(map(str, self.patch_size))
        return (
            f"{self.origin}: {network} by {self.method}, {self.input_channels} channel(s), {size} voxels ({self.kind})"
        )


def from_ours(content: dict[str, Any], origin: str) -> Pretrained:
    """A checkpoint of ours, final or latest.

    Raises:
        NnsslError: it does not keep to the schema.
    """
    check(content, origin)
    ours = content["nnssl_ext"]
    found = configuration_of(ours["plans"], ours["configuration"])
    return Pretrained(
        origin=origin,
        kind="nnssl_ext",
        method=ours["method"],
        weights=content["network_weights"],
        not_pretrained=frozenset(ours["not_pretrained"]),
        architecture=found["architecture"],
        preset=found.get("nnssl", {}).get("preset", ""),
        input_channels=ours["input_channels"],
        patch_size=tuple(found["patch_size"]),
        spacing=None,  # our planners derive it from the data
        normalization_schemes=tuple(found["normalization_schemes"]),
        batch_size=int(found["batch_size"]),
        citations=content["citations"],
        about={name: ours[name] for name in ("settings", "data", "progress")},
        method_state=content.get("resume", {}).get("method", {}),
    )
