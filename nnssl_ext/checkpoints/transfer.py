"""Weights from a checkpoint into a network, with a table that accounts for every tensor of both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from nnssl_ext.checkpoints.adaptation_plan import token_grid, token_size
from nnssl_ext.checkpoints.aliases import alias_groups
from nnssl_ext.checkpoints.pretrained import Pretrained
from nnssl_ext.checkpoints.reconcile import REMEDY, reconcile
from nnssl_ext.checkpoints.tensors import change_channels, interpolate_positions, pad_kernel, resize_token_kernel
from nnssl_ext.errors import NnsslError

if TYPE_CHECKING:
    from rich.table import Table

Action = Literal["loaded", "adapted", "new", "skipped"]

HEADS = ".seg_layers."
"""nnU-Net's loader never transfers these: they belong to the classes of a data set."""


@dataclass(frozen=True)
class Row:
    """What became of one tensor.

    Attributes:
        key: its first name in the target network, or for ``skipped`` its name in the checkpoint.
        action: loaded unchanged | adapted | new: the network's own initialisation | skipped: the network has no use for it.
        why: one phrase.
        source, target: shapes in checkpoint and network, None where it does not exist.
        aliases: further names of the same tensor in the target network.
    """

    key: str
    action: Action
    why: str
    source: tuple[int, ...] | None
    target: tuple[int, ...] | None
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class TransferTable:
    """The account of a transfer: one row per tensor of the target, then one per unused tensor of the checkpoint."""

    rows: tuple[Row, ...]

    def __str__(self) -> str:
        return ", ".join(f"{count} {action}" for action, count in self.counts().items())

    def counts(self) -> dict[str, int]:
        """Tensors per action."""
        return {
            action: sum(row.action == action for row in self.rows) for action in ("loaded", "adapted", "new", "skipped")
        }

    def keys(self, action: Action) -> list[str]:
        """All names, aliases included, of the tensors with this action."""
        return [name for row in self.rows if row.action == action for name in (row.key, *row.aliases)]

    def as_json(self) -> dict[str, Any]:
        """Counts and rows in JSON types."""
        return {"counts": self.counts(), "rows": [asdict(row) for row in self.rows]}

    def as_table(self) -> Table:
        """For the terminal."""
        from rich.table import Column, Table

        table = Table(
            Column("tensor", overflow="fold"), "action", "checkpoint", "network", "why", title=f"transfer: {self}"
        )
        colours = {"loaded": "green", "adapted": "yellow", "new": "cyan", "skipped": "dim"}
        for row in self.rows:
            sizes = ("x".join(map(str, size)) if size is not None else "-" for size in (row.source, row.target))
            table.add_row(row.key, f"[{colours[row.action]}]{row.action}", *sizes, row.why)
        return table


def transfer(
    source: Pretrained,
    target: Any,
    architecture: Mapping[str, Any],
    plans_name: str,
    resize_tokens: bool = False,
) -> TransferTable:
    """Fill a freshly initialised network in place.

    Each tensor is written once, under all its names. What the checkpoint cannot give keeps the network's initialisation.

    Args:
        source: the checkpoint.
        target: network of nnU-Net's library, built from `architecture`.
        architecture: the target plans' entry.
        plans_name: for messages.
        resize_tokens: resize a patch embedding to tokens of another size, for further pretraining.

    Raises:
        NnsslError: the encoders do not fit; all differences are named, nothing was changed.
    """
    reconcile(source.architecture, architecture, source.origin, plans_name, resize_tokens)
    state: dict[str, Tensor] = target.state_dict()
    planned = [_plan(source, names, state[names[0]], target, architecture) for names in alias_groups(state)]
    misfits = [row for row, _ in planned if row.why == MISFIT and not row.key.startswith("decoder.")]
    if misfits:
        named = ", ".join(f"{row.key} is {row.source}, needed {row.target}" for row in misfits[:5])
        raise NnsslError(
            f"{source.origin} does not fit plans {plans_name} in {len(misfits)} encoder tensors: {named}", REMEDY
        )
    if not any(row.action in ("loaded", "adapted") for row, _ in planned):
        raise NnsslError(f"{source.origin} has no tensor for the network of plans {plans_name}", REMEDY)
    with torch.no_grad():
        for row, value in planned:
            if value is not None:
                state[row.key].copy_(value)
    rows = [row for row, _ in planned]
    return TransferTable((*rows, *_unused(source, {name for row in rows for name in (row.key, *row.aliases)})))


MISFIT = "another shape in the checkpoint"


def _plan(
    source: Pretrained, names: tuple[str, ...], current: Tensor, target: Any, architecture: Mapping[str, Any]
) -> tuple[Row, Tensor | None]:
    """What to do with one tensor of the target, and its new value."""
    key, aliases = names[0], names[1:]
    found = next((name for name in names if name in source.weights), None)
    value = source.weights[found] if found else None
    shape, needed = tuple(value.shape) if value is not None else None, tuple(current.shape)

    def row(action: Action, why: str) -> Row:
        return Row(key, action, why, shape, needed, aliases)

    if HEADS in key:
        return row("new", "segmentation heads belong to the target's classes"), None
    old, new = source.architecture["arch_kwargs"], architecture["arch_kwargs"]
    if key.startswith("decoder.") and old.get("n_stages") != new.get("n_stages"):
        return row(
            "new", f"the checkpoint's decoder belongs to {old.get('n_stages')} stages, not {new.get('n_stages')}"
        ), None
    if key.startswith("decoder.") and hasattr(target, "token_size") and token_size(old) != token_size(new):
        return row("new", f"the checkpoint's decoder belongs to tokens of {token_size(old)} voxels"), None
    if value is None:
        return row("new", "not in the checkpoint"), None
    if found in source.not_pretrained:
        return row("new", "in the checkpoint, but never trained there"), None
    reasons = []
    if key == target.key_to_lpe and token_grid(old) != token_grid(new):
        value = interpolate_positions(value, token_grid(old), token_grid(new))
        reasons.append(f"positions interpolated from {token_grid(old)} to {token_grid(new)} tokens")
    if key.removesuffix(".weight") in target.keys_to_in_proj and value.shape[1] != needed[1]:
        value = change_channels(value, needed[1])
        reasons.append(f"channels {source.input_channels} -> {needed[1]}: their sum, divided evenly")
    if key == f"{target.key_to_stem}.proj.weight" and value.shape[2:] != needed[2:]:
        value = resize_token_kernel(value, needed[2:])
        reasons.append(f"tokens resized from {token_size(old)} to {token_size(new)} voxels")
    if value.shape[:2] == needed[:2] and value.shape[2:] != needed[2:] and _can_pad(value, needed, key, target):
        reasons.append(f"kernel {tuple(value.shape[2:])} padded with zeros")
        value = pad_kernel(value, needed[2:])
    if tuple(value.shape) != needed:
        return row("new", MISFIT), None
    return (row("adapted", "; ".join(reasons)) if reasons else row("loaded", "")), value


def _can_pad(kernel: Tensor, needed: tuple[int, ...], key: str, target: Any) -> bool:
    layer = target.get_submodule(key.rpartition(".")[0])
    grows = all(new >= old and (new - old) % 2 == 0 for old, new in zip(kernel.shape[2:], needed[2:], strict=True))
    return isinstance(layer, nn.Conv3d) and key.endswith(".weight") and grows


def _unused(source: Pretrained, taken: set[str]) -> list[Row]:
    """Rows for tensors of the checkpoint of which no name exists in the target."""
    return [
        Row(names[0], "skipped", "the network has no such tensor", tuple(source.weights[names[0]].shape), None)
        for names in alias_groups(source.weights)
        if not taken.intersection(names)
    ]
