"""What a pretraining run writes into its checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from nnssl_ext.checkpoints.adaptation_plan import adaptation_plan
from nnssl_ext.checkpoints.aliases import keys_outside
from nnssl_ext.checkpoints.schema import VERSION
from nnssl_ext.contracts import Backbone
from nnssl_ext.plans import configuration_of

PRIMUS_PAPER = (
    "Wald, T., et al. (2025). Primus: Enforcing attention usage for 3D medical image segmentation. arXiv:2503.01835."
)
RESENC_PAPER = (
    "Isensee, F., et al. (2024). nnU-Net revisited: A call for rigorous validation in 3D medical image segmentation. "
    "MICCAI 2024. arXiv:2404.09556."
)
SWIN_PAPER = (
    "Hatamizadeh, A., et al. (2022). Swin UNETR: Swin transformers for semantic segmentation of brain tumors in MRI images. "
    "arXiv:2201.01266."
)
NNUNET_PAPER = (
    "Isensee, F., Jaeger, P. F., Kohl, S. A., Petersen, J., & Maier-Hein, K. H. (2021). nnU-Net: a self-configuring method "
    "for deep learning-based biomedical image segmentation. Nature Methods, 18(2), 203-211."
)


def checkpoint_content(
    *,
    backbone: Backbone,
    plans: dict[str, Any],
    configuration: str,
    method: str,
    settings: dict[str, Any],
    citations: Sequence[str],
    pretrained_prefixes: Sequence[str],
    data_summary: dict[str, Any],
    progress: dict[str, Any],
) -> dict[str, Any]:
    """A complete checkpoint by `schema`, ready for `save_checkpoint`; the engine adds ``resume`` to its own.

    Args:
        backbone: its ``network``, the one that `plans` build, gives ``network_weights``.
        configuration: configuration of `plans` that was pretrained.
        method, settings, citations: name, all settings and papers of the method.
        pretrained_prefixes: parameter-name prefixes of the network that the method trained; a tensor with several names counts
            as pretrained if one of them matches. All other tensors still are nnU-Net's own initialisation and are listed.
        data_summary: counts, spacings, dataset name. Case names and paths must not be in it: checkpoints are shared.
        progress: epochs and steps done.

    Raises:
        ValueError: no tensor of the network matches `pretrained_prefixes`.
    """
    network = backbone.network
    weights = network.state_dict()
    not_pretrained = keys_outside(weights, pretrained_prefixes)
    if len(not_pretrained) == len(weights):
        raise ValueError(
            f"no weight starts with {tuple(pretrained_prefixes)}; the network has e.g. {list(weights)[:3]}"
        )
    return assemble(
        network,
        plans,
        configuration,
        method=method,
        citations=nnssl_citations(method, citations, configuration_of(plans, configuration)["architecture"]),
        not_pretrained=not_pretrained,
        about={"settings": settings, "data": data_summary, "progress": progress},
    )


def assemble(
    network: Any,
    plans: dict[str, Any],
    configuration: str,
    *,
    method: str,
    citations: list[dict[str, Any]],
    not_pretrained: list[str],
    about: dict[str, Any],
) -> dict[str, Any]:
    """A checkpoint by `schema` around a network that `plans` build.

    Args:
        citations: in nnssl's format.
        about: the entries settings, data, progress and, where there is one, adapted_from.
    """
    channels = input_channels(network)
    return {
        "network_weights": network.state_dict(),
        "nnssl_adaptation_plan": adaptation_plan(network, plans, configuration, channels),
        "citations": citations,
        "nnssl_ext": {
            "schema": VERSION,
            "version": version("nnssl-ext"),
            "method": method,
            "plans": json.loads(json.dumps(plans)),
            "configuration": configuration,
            "input_channels": channels,
            "not_pretrained": not_pretrained,
            **json.loads(json.dumps(about)),
        },
    }


def input_channels(network: Any) -> int:
    """Image channels that a network of nnU-Net's library was built for, read off its first layer."""
    layer = network.get_submodule(network.keys_to_in_proj[0])
    return int(layer.weight.shape[1])


def nnssl_citations(method: str, papers: Sequence[str], architecture: dict[str, Any]) -> list[dict[str, Any]]:
    """The papers of method, architecture and framework in the format that nnssl's readers print."""
    network = architecture["network_class_name"].rsplit(".", 1)[-1]
    papers_of = {"SegmentationPrimus": PRIMUS_PAPER, "SegmentationSwinUNETR": SWIN_PAPER}
    return [
        {"type": "Pretraining method", "name": method, "apa_citations": list(papers)},
        {"type": "Architecture", "name": network, "apa_citations": [papers_of.get(network, RESENC_PAPER)]},
        {"type": "Framework", "name": "nnU-Net", "apa_citations": [NNUNET_PAPER]},
    ]
