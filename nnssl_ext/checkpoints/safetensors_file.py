"""A whole checkpoint as one safetensors file, a format that cannot hold code: each tensor once, all else as JSON in its header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nnssl_ext.checkpoints.aliases import alias_groups
from nnssl_ext.errors import NnsslError
from nnssl_ext.files import atomic_write

ENTRY = "nnssl_ext"
"""Our entry of the header's metadata: JSON of ``names`` (every name of the state dict, in its order, and the name that its tensor
is stored under) and ``content`` (the checkpoint without its tensors)."""


def write_safetensors(path: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint whose tensors all stand under ``network_weights``.

    Tensors with several names are stored under the first, so that ``safetensors.torch.load_model`` fills a network too. The
    same content gives the same bytes: safetensors writes several entries of metadata in random order, so there is one.

    Raises:
        NnsslError: the folder cannot be written.
        TypeError: another entry holds what JSON cannot.
    """
    weights = content["network_weights"]
    names = {name: group[0] for group in alias_groups(weights) for name in group}
    rest = {key: value for key, value in content.items() if key != "network_weights"}
    header = json.dumps({"names": {name: names[name] for name in weights}, "content": rest})
    tensors = {name: weights[name].contiguous() for name in dict.fromkeys(names.values())}
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata={ENTRY: header})


def read_safetensors(path: Path) -> dict[str, Any]:
    """The checkpoint that `write_safetensors` wrote, on the CPU; tensors with several names share memory again.

    Raises:
        NnsslError: a damaged file, or one of somebody else.
    """
    try:
        with safe_open(path, "pt") as file:
            header = (file.metadata() or {}).get(ENTRY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        raise NnsslError(
            f"{path} is truncated or damaged, or no safetensors file: {error}", "fetch it again"
        ) from error
    if header is None:
        raise NnsslError(
            f"{path} holds weights, but does not say of which network",
            "use a file that nnssl_export wrote, or the checkpoint_final.pth",
        )
    found = json.loads(header)
    return {
        "network_weights": {name: tensors[stored] for name, stored in found["names"].items()},
        **found["content"],
    }
