"""What a user may give where a checkpoint is wanted, as a file on this computer whose hashes were checked.

- a file;
- a folder that ``nnssl_export`` wrote, or a copy of a repository in its layout or in OpenMind's;
- ``hf:OWNER/NAME`` or ``hf:OWNER/NAME@REVISION``, such a folder on the Hugging Face hub; a revision is a branch, tag or commit.

Where a ``SHA256SUMS`` lies beside a file, the file must agree with it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from nnssl_ext.errors import NnsslError
from nnssl_ext.files import sha256_of

SAFETENSORS, CHECKPOINT = "model.safetensors", "checkpoint_final.pth"
WEIGHTS = (SAFETENSORS, CHECKPOINT)
"""Files that a folder may hold its weights in, the one to take first; OpenMind's repositories have the second alone."""
SUMS = "SHA256SUMS"

_LEVEL = r"(?:(?:encoder|decoder)\d+|labels)(?:\+|$)"  # what nnssl_register takes after a network is no revision
_HUB = re.compile(rf"\bhf:/{{0,2}}(?P<repository>[\w.-]+/[\w.-]+)(?:@(?!{_LEVEL})(?P<revision>[\w./-]+))?")


def checkpoint_file(source: str | os.PathLike[str]) -> Path:
    """The local file behind `source`; for the hub, in its cache.

    Raises:
        NnsslError: nothing there, no weights in it, a file that differs from its hash, or a hub that cannot be reached.
    """
    if found := _HUB.fullmatch(_text(source)):
        from nnssl_ext.checkpoints.hub import download

        path = download(found["repository"], found["revision"])
    else:
        path = Path(source)
    if path.is_dir():
        path = _weights_in(path)
    if not path.is_file():
        raise NnsslError(
            f"no checkpoint at {source}",
            "check the path; nnssl_train writes checkpoint_final.pth. On the Hugging Face hub: hf:OWNER/NAME",
        )
    check_sums(path)
    return path


def on_hub(source: str | os.PathLike[str]) -> bool:
    """Whether `source` names a repository of the Hugging Face hub."""
    return _HUB.fullmatch(_text(source)) is not None


def recorded(source: str | os.PathLike[str]) -> str:
    """`source` as a record keeps it: a file of this computer by its full path, whatever folder a command was started in."""
    return _text(source) if on_hub(source) else str(Path(source).resolve())


def name_of(source: str | os.PathLike[str]) -> str:
    """What to call `source` in messages and in checkpoints made from it: no folders, which may say who works where."""
    return _text(source) if on_hub(source) else Path(source).name


def with_local_files(text: str) -> str:
    """Features as ``nnssl_register -c`` takes them (``hf:OWNER/NAME@encoder1+mind``), with local files for repositories.

    Raises:
        NnsslError: as `checkpoint_file`.
    """
    return _HUB.sub(lambda found: str(checkpoint_file(found[0])), text)


def check_sums(path: Path) -> None:
    """Compare a file with the ``SHA256SUMS`` beside it, if that lists it.

    Raises:
        NnsslError: they differ, or the sums cannot be read.
    """
    listed = path.parent / SUMS
    wanted = read_sums(listed).get(path.name) if listed.is_file() else None
    if wanted is not None and sha256_of(path) != wanted:
        raise NnsslError(
            f"{path} is not the file that was shared: its SHA-256 differs from the one in {listed}",
            "delete it and fetch it again; if that does not help, tell its author",
        )


def read_sums(path: Path) -> dict[str, str]:
    """File name -> SHA-256, from a file as ``sha256sum`` writes it.

    Raises:
        NnsslError: a line that is none of these.
    """
    lines = [re.fullmatch(r"([0-9a-f]{64}) [ *](\S.*)", line) for line in path.read_text().splitlines()]
    if not all(lines):
        raise NnsslError(
            f"{path} is damaged: line {lines.index(None) + 1} is no SHA-256 and file name", "fetch it again"
        )
    return {line[2]: line[1] for line in lines if line}


def _weights_in(folder: Path) -> Path:
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise NnsslError(
        f"{folder} holds no checkpoint ({' or '.join(WEIGHTS)})",
        "give the file itself, or a folder that nnssl_export wrote",
    )


def _text(source: str | os.PathLike[str]) -> str:
    return os.fspath(source).replace("\\", "/")  # a Path turns slashes on Windows
