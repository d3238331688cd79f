"""Which half of the network a parameter belongs to, and its place in the optimiser."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from nnssl_ext.errors import NnsslError
from nnssl_ext.networks.layers import layer_numbers
from nnssl_ext.trainers.finetuning.schedules import rates
from nnssl_ext.trainers.finetuning.settings import FinetuneSettings

Half = Literal["encoder", "decoder", "head"]

_ENCODER = ("encoder.", "decoder.encoder.", "down_projection.", "eva.", "class_token", "register_tokens", "swinViT.")
_NOT_DECAYED = ("pos_embed", "class_token", "register_tokens")


def half_of(name: str) -> Half:
    """The half of nnU-Net's U-Nets, Primus or Swin UNETR that a parameter name belongs to; segmentation layers are the head."""
    if ".seg_layers." in name:
        return "head"
    return "encoder" if name.startswith(_ENCODER) else "decoder"


def parameter_groups(network: nn.Module, settings: FinetuneSettings) -> list[dict[str, Any]]:
    """Optimiser groups, each with its ``half``, ``layer_scale`` (from ``layer_decay``) and ``weight_decay``.

    Raises:
        NnsslError: layer-wise decay for a network without Primus blocks.
    """
    named = dict(network.named_parameters())
    numbers = layer_numbers(network) if hasattr(network, "eva") else {}
    depth = max(numbers.values(), default=0)
    if settings.layer_decay != 1 and depth == 0:
        raise NnsslError(
            f"layer_decay {settings.layer_decay} needs the blocks of a Primus, not {type(network).__name__}",
            "set layer_decay to 1 in the plans block nnssl_finetuning",
        )
    groups: dict[tuple[Half, int, bool], dict[str, Any]] = {}
    for name, parameter in named.items():
        half = half_of(name)
        layer = next((number for part, number in numbers.items() if name.startswith(part)), depth + 1)
        decayed = parameter.ndim > 1 and not any(part in name for part in _NOT_DECAYED)
        group = groups.setdefault(
            (half, layer, decayed),
            {
                "params": [],
                "half": half,
                "frozen": False,
                "layer_scale": settings.layer_decay ** (depth + 1 - layer),
                "weight_decay": settings.weight_decay if decayed else 0.0,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def freeze_unused_heads(network: nn.Module) -> None:
    """Without deep supervision only the finest segmentation layer is read; DDP refuses parameters that never get a
    gradient but ask for one."""
    heads = getattr(getattr(network, "decoder", None), "seg_layers", None)
    for head in list(heads or ())[:-1]:
        head.requires_grad_(False)


class IterationSchedule:
    """Sets the learning rates of an optimiser iteration by iteration; ``step(epoch)`` is for nnU-Net's call.

    Attributes:
        pretrained: whether pretrained weights arrived; decides the rates of the whole run.
    """

    def __init__(self, optimizer: Optimizer, settings: FinetuneSettings) -> None:
        # not its param_groups: loading a state dict replaces that list
        self.optimizer, self.settings, self.pretrained = optimizer, settings, False

    def step(self, epoch: int) -> None:
        """Rates of the epoch's first iteration."""
        self.at(epoch * self.settings.iterations_per_epoch)

    def at(self, iteration: int) -> None:
        """Rates of an iteration, counted from 0; groups without one are marked ``frozen``."""
        now = rates(self.settings, iteration, self.pretrained)
        for group in self.optimizer.param_groups:
            rate = now.encoder if group["half"] == "encoder" else now.decoder
            group["frozen"] = rate is None
            group["lr"] = (rate or 0.0) * (group["layer_scale"] if self.pretrained else 1.0)
