"""A trained (or, as a control, untrained) network as a describer of scans, with what it wants to be fed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Real
from torch import Tensor, nn

from nnssl_ext.checkpoints.io import load_checkpoint
from nnssl_ext.checkpoints.nnssl_format import from_nnssl
from nnssl_ext.checkpoints.nnunet_format import from_nnunet
from nnssl_ext.checkpoints.pretrained import Pretrained, from_ours
from nnssl_ext.checkpoints.provenance import TrainingCases, training_cases
from nnssl_ext.checkpoints.schema import kind_of
from nnssl_ext.checkpoints.source import name_of
from nnssl_ext.checkpoints.transfer import transfer
from nnssl_ext.contracts import Backbone
from nnssl_ext.errors import NnsslError
from nnssl_ext.files import read_json
from nnssl_ext.networks.build import build_backbone
from nnssl_ext.networks.segmentation_layer import trained_layer
from nnssl_ext.plans import configuration_of
from nnssl_ext.records import Size

CHANNELS = 1
"""Scans are registered channel by channel; networks for more get the first layer's channels summed and divided evenly."""


@dataclass(frozen=True)
class Encoder:
    """A network, frozen, and the preprocessing it was trained with.

    Attributes:
        backbone: in evaluation mode, without gradients.
        spacing: mm along z, y, x, of the scan's axes.
        axes: which of the scan's axes (z, y, x) are the network's three, in this order.
        patch_size: voxels of the network's axes it was planned for.
        scheme: class name of nnU-Net's intensity normalisation.
        masked: whether that looks at the nonzero voxels only.
        intensities: the data set's foreground statistics, which CT normalisation needs.
        weights: whose weights these are, one phrase.
        untrained: names of weights that no training touched.
        tells_labels: whether the segmentation layer was trained to tell labels of which each voxel has one.
        notes: what deserves attention, one sentence each.
    """

    backbone: Backbone
    spacing: tuple[float, float, float]
    axes: Size
    patch_size: Size
    scheme: str
    masked: bool
    intensities: Mapping[str, float]
    weights: str
    untrained: frozenset[str] = frozenset()
    tells_labels: bool = False
    notes: tuple[str, ...] = ()

    def require_decoder(self) -> None:
        """Refuse a decoder that no training touched.

        Raises:
            NnsslError: it has such weights.
        """
        if any(key.startswith(self.backbone.decoder_prefixes) for key in self.untrained):
            raise NnsslError(
                f"{self.weights}: its training left the decoder untouched", "use the encoder's levels, such as encoder0"
            )

    def require_labels(self) -> None:
        """Refuse a network that was not taught labels, each voxel one.

        Raises:
            NnsslError: it was not.
        """
        if not self.tells_labels:
            raise NnsslError(
                f"{self.weights}: its training did not teach it labels that exclude each other",
                "use a checkpoint of nnUNetv2_train, or of RegistrationTrainer with --labels, or a level such as decoder0",
            )

    def normalise(self, raw: Real[np.ndarray, "Z Y X"]) -> Float[np.ndarray, "Z Y X"]:
        """The intensities that training saw: cropped to what is nonzero and normalised as nnU-Net does, on the scan's own
        grid; around the crop its border is repeated.
        """
        import nnunetv2
        from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero
        from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

        module = "nnunetv2.preprocessing.normalization"
        folder = str(Path(nnunetv2.__path__[0]) / "preprocessing" / "normalization")
        scheme = recursive_find_python_class(folder, self.scheme, module)
        if scheme is None:
            raise NnsslError(
                f"no normalisation {self.scheme}, which the network was trained with, is installed",
                "install the package that holds it (nnssl_doctor checks the plugin)",
            )
        cropped, outside, box = crop_to_nonzero(np.array(raw, np.float32)[None])  # a copy: some schemes work in place
        normaliser = scheme(use_mask_for_norm=self.masked, intensityproperties=dict(self.intensities))
        normal = np.asarray(normaliser.run(cropped[0], outside[0]), np.float32)
        beyond = [(low, length - high) for (low, high), length in zip(box, raw.shape, strict=True)]
        return np.pad(normal, beyond, mode="edge")


@dataclass(frozen=True)
class Source:
    """A checkpoint, read once: files of running trainings are replaced now and then.

    Attributes:
        pretrained: its weights and what is known of them.
        plans, configuration: what builds its network.
        learned_from: the cases behind it, as far as they are recorded.
        overlapping: whether what its segmentation layer tells are regions that may overlap.
    """

    pretrained: Pretrained
    plans: dict[str, Any]
    configuration: str
    learned_from: TrainingCases
    overlapping: bool = False

    @property
    def segmentation_layer(self) -> dict[str, Tensor]:
        """Its weights, where it was trained."""
        return trained_layer(self.pretrained.weights, self.pretrained.not_pretrained)

    @property
    def classes(self) -> int:
        """Labels that this layer tells, the background included; 2 where it was not trained."""
        return next((len(value) for value in self.segmentation_layer.values()), 2)


def read_source(path: Path) -> Source:
    """The network in a checkpoint of ours, of nnssl (OpenMind), or of nnU-Net.

    Raises:
        NnsslError: no checkpoint, or one of another kind.
    """
    content, name = load_checkpoint(path), name_of(path)
    kind = kind_of(content, name)
    if kind == "nnssl_ext":
        source = from_ours(content, name)
        plans, configuration = content["nnssl_ext"]["plans"], content["nnssl_ext"]["configuration"]
        return Source(source, plans, configuration, training_cases(path, content))
    cases = training_cases(path, content)
    if kind == "nnunet":
        pretrained, started = from_nnunet(content, name), content["init_args"]
        labels = (started.get("dataset_json") or {}).get("labels", {})
        overlapping = any(isinstance(label, list | tuple) and len(label) > 1 for label in labels.values())
        return Source(pretrained, started["plans"], started["configuration"], cases, overlapping)
    source = from_nnssl(content, name)
    return Source(source, _plans_of(source), "3d_fullres", cases)


def load_encoder(path: Path, device: torch.device) -> Encoder:
    """The trained network in a checkpoint, for one channel.

    Raises:
        NnsslError: no checkpoint, one of another kind, or one without (all of) an encoder's weights.
    """
    return trained_encoder(read_source(path), device)


def trained_encoder(source: Source, device: torch.device, channels: int = CHANNELS) -> Encoder:
    """The network with the checkpoint's weights.

    Args:
        channels: of the images; where training had another number, the first layer's are summed and divided evenly.

    Raises:
        NnsslError: the checkpoint lacks (some of) an encoder's weights.
    """
    pretrained = source.pretrained
    origin = pretrained.origin
    about = f"{pretrained.method} ({origin})"
    encoder = _initial(  # what no training touched is alike too
        source.plans, source.configuration, device, about, 0, channels, source.classes
    )
    network = encoder.backbone.network
    table = transfer(pretrained, network, pretrained.architecture, f"of {origin}")
    untrained = frozenset(table.keys("new"))
    lacking = sorted(key for key in untrained if key.startswith(encoder.backbone.encoder_prefixes))
    if lacking:
        raise NnsslError(
            f"{origin} lacks {len(lacking)} weights of the encoder, e.g. {lacking[0]}",
            "use a checkpoint whose pretraining has an encoder (nnssl_inspect shows what is in it)",
        )
    layer = source.segmentation_layer
    network.load_state_dict(layer, strict=False)
    notes = list(pretrained.notes)
    if pretrained.input_channels != channels:
        to = "one" if channels == 1 else str(channels)
        notes.append(
            f"the network was trained on {pretrained.input_channels} channels; their weights were summed for {to}"
        )
    tells_labels = bool(layer) and not source.overlapping
    return replace(encoder, untrained=untrained.difference(layer), tells_labels=tells_labels, notes=tuple(notes))


def untrained_encoder(source: Source, device: torch.device, seed: int, channels: int = CHANNELS) -> Encoder:
    """The same network with nnU-Net's initial weights: the control."""
    about = f"random weights, seed {seed} ({source.pretrained.origin})"
    return _initial(source.plans, source.configuration, device, about, seed, channels, source.classes)


def random_encoder(path: Path, device: torch.device, seed: int = 0) -> Encoder:
    """The same network as in plans or in a checkpoint, with nnU-Net's initial weights, for one channel.

    Args:
        path: a plans file (the first 3D configuration counts), or a checkpoint.

    Raises:
        NnsslError: neither of these.
    """
    if path.suffix != ".json":
        return untrained_encoder(read_source(path), device, seed)
    plans = read_json(path)
    if not isinstance(plans, dict) or "configurations" not in plans:
        raise NnsslError(f"{path} holds no plans", "give a plans file, such as a run's plans.json")
    volumes = [name for name in plans["configurations"] if len(_found(plans, name).get("patch_size", ())) == 3]
    if not volumes:
        raise NnsslError(f"{path} has no 3D configuration", "give plans with one, such as 3d_fullres")
    configuration = "3d_fullres" if "3d_fullres" in volumes else volumes[0]
    return _initial(plans, configuration, device, f"random weights, seed {seed} ({path.name})", seed)


def _initial(
    plans: dict[str, Any],
    configuration: str,
    device: torch.device,
    weights: str,
    seed: int,
    channels: int = CHANNELS,
    classes: int = 2,
) -> Encoder:
    found = configuration_of(plans, configuration)
    if len(found["patch_size"]) != 3:
        raise NnsslError(f"configuration {configuration} of {weights} is 2D", "a 3D network is needed")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = build_backbone(plans, configuration, channels, classes)
    module = cast(nn.Module, backbone).eval().requires_grad_(False).to(device)
    forward = [int(axis) for axis in plans.get("transpose_forward", (0, 1, 2))]
    spacing = [0.0] * 3
    for axis, mm in zip(forward, found["spacing"], strict=True):
        spacing[axis] = float(mm)
    pz, py, px = (int(edge) for edge in found["patch_size"])
    return Encoder(
        backbone=cast(Backbone, module),
        spacing=(spacing[0], spacing[1], spacing[2]),
        axes=(forward[0], forward[1], forward[2]),
        patch_size=(pz, py, px),
        scheme=found["normalization_schemes"][0],
        masked=bool(found["use_mask_for_norm"][0]),
        intensities=plans.get("foreground_intensity_properties_per_channel", {}).get("0", {}),
        weights=weights,
    )


def _found(plans: dict[str, Any], configuration: str) -> dict[str, Any]:
    return configuration_of({"plans_name": "", **plans}, configuration)


def _plans_of(source: Pretrained) -> dict[str, Any]:
    """Plans of one configuration for a checkpoint that comes without; a spacing that followed the data counts as 1 mm."""
    return {
        "plans_name": source.origin,
        "configurations": {
            "3d_fullres": {
                "patch_size": list(source.patch_size),
                "spacing": list(source.spacing or (1.0, 1.0, 1.0)),
                "normalization_schemes": list(source.normalization_schemes),
                "use_mask_for_norm": [False] * len(source.normalization_schemes),
                "architecture": source.architecture,
            }
        },
    }
