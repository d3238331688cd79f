"""Checkpoint files: written atomically from plain types, read without running anything that stands in them."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnssl_ext.checkpoints.safetensors_file import read_safetensors
from nnssl_ext.checkpoints.schema import PLAIN
from nnssl_ext.checkpoints.source import checkpoint_file
from nnssl_ext.errors import NnsslError
from nnssl_ext.files import atomic_write

OURS = "use a checkpoint of nnssl-ext, nnssl or nnU-Net"


def save_checkpoint(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write a checkpoint whole or not at all, with every tensor on the CPU, and make sure that it loads again.

    Tensors that share memory (nnU-Net's networks name many tensors twice) are stored once and share it when loaded.

    Raises:
        NnsslError: the folder cannot be written.
        TypeError: a value is neither a tensor nor a plain type; the message names its key.
    """
    plain = _plain(dict(content), "", {})
    with atomic_write(path) as temporary:
        torch.save(plain, temporary)
        torch.load(temporary, map_location="cpu", weights_only=True, mmap=True)


def load_checkpoint(source: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint of ours, of nnssl or of nnU-Net, on the CPU, with ``weights_only=True`` or as safetensors.

    nnU-Net's own files hold NumPy scalars (its losses and Dice); these, and nothing else, are allowed in addition.

    Args:
        source: a file, an exported folder, or ``hf:OWNER/NAME[@REVISION]``, see `checkpoint_file`.

    Raises:
        NnsslError: missing, damaged, tampered or foreign file. Code in a foreign pickle is not executed.
    """
    path = checkpoint_file(source)
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    if zipfile.is_zipfile(path) and (damaged := _damaged(path)):
        raise NnsslError(f"{path} is damaged: {damaged} in it differs from its checksum", "copy or train it again")
    try:
        with torch.serialization.safe_globals(_numpy_scalars()):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f"{path} holds the Python object {named[1]}" if named else f"{path} is no checkpoint"
        raise NnsslError(f"{what}; it was refused and nothing in it was executed", OURS) from error
    except (RuntimeError, EOFError, LookupError, ValueError, AttributeError) as error:
        if "memory" in str(error):
            raise
        raise NnsslError(
            f"{path} is truncated or damaged, or no checkpoint at all: {error}", "copy or train it again"
        ) from error
    if not isinstance(content, dict):
        raise NnsslError(f"{path} holds a {type(content).__name__}, not a dict", OURS)
    return content


def _damaged(path: str | os.PathLike[str]) -> str | None:
    """The first part of the file that differs from its checksum, which torch does not compare."""
    with zipfile.ZipFile(path) as archive:
        try:
            return archive.testzip()
        except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
            return str(error)


def _plain(value: Any, key: str, seen: dict[tuple[Any, ...], Tensor]) -> Any:
    """A copy made of CPU tensors and plain types; tensors that share memory share their copy (`seen`)."""
    if isinstance(value, Tensor):
        identity = (value.device, value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
        if value.numel() == 0 or identity not in seen:
            # clone: a view would drag its whole storage into the file
            seen[identity] = value.detach().to("cpu", copy=True).contiguous()
        return seen[identity]
    if isinstance(value, Mapping):
        for name in value:
            if type(name) not in PLAIN:
                raise TypeError(f"checkpoint entry '{key}' has a key of type {type(name).__name__}")
        return {name: _plain(item, f"{key}.{name}" if key else str(name), seen) for name, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(item, f"{key}[{i}]", seen) for i, item in enumerate(value))
    if type(value) in PLAIN:
        return value
    raise TypeError(f"checkpoint entry '{key}' is a {type(value).__module__}.{type(value).__qualname__}, no plain type")


def _numpy_scalars() -> list[Any]:
    """What unpickling NumPy scalars needs, under the names of NumPy 1 and 2."""
    scalar = np.float32(0).__reduce__()[0]
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    dtypes = [type(np.dtype(kind)) for kind in (np.float16, np.float32, np.float64, np.int32, np.int64, np.bool_)]
    return [*((scalar, name) for name in names), np.dtype, *dtypes]
