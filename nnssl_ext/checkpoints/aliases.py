"""Which names of a state dict mean the same tensor.

nnU-Net's U-Nets register their encoder twice (``encoder``, ``decoder.encoder``) and each layer of a block twice (``conv``,
``all_modules.0``): a small ResEnc names 66 tensors 224 times. Loading applies names in order, so one stale name silently
overwrites what another name loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor


def alias_groups(state: Mapping[str, Tensor]) -> list[tuple[str, ...]]:
    """The names of each tensor of a live state dict, in its order."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for key, value in state.items():
        shared = (value.device, value.data_ptr(), tuple(value.shape)) if value.numel() else (key,)
        groups.setdefault(shared, []).append(key)
    return [tuple(names) for names in groups.values()]


def keys_outside(state: Mapping[str, Tensor], prefixes: Iterable[str]) -> list[str]:
    """The names of all tensors of which no name starts with one of `prefixes`."""
    wanted = tuple(prefixes)
    return [name for names in alias_groups(state) if not any(n.startswith(wanted) for n in names) for name in names]
