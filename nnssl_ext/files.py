"""Files that appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nnssl_ext.errors import NnsslError


@contextmanager
def atomic_write(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `target`; on success fsync it and rename it over `target`, else delete it.

    The temporary name keeps the suffixes of `target`, because image writers choose the format by them.

    Raises:
        NnsslError: the folder cannot be written (missing rights, full disk), naming it.
    """
    target = Path(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(
            prefix=f".{target.name.split('.')[0]}-", suffix="".join(target.suffixes), dir=target.parent
        )
        os.close(handle)
    except OSError as error:
        raise NnsslError(
            f"cannot write {target}: {error}", f"make {target.parent} writable or free space on it"
        ) from error
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o666 & ~_umask())
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise NnsslError(
            f"cannot write {target}: {error}", f"make {target.parent} writable or free space on it"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(target: str | os.PathLike[str], content: Any) -> None:
    """Write `content` as indented JSON, atomically."""
    text = json.dumps(content, indent=2, sort_keys=False) + "\n"
    with atomic_write(target) as temporary:
        temporary.write_text(text)


def read_json(source: str | os.PathLike[str]) -> Any:
    """Read a JSON file.

    Raises:
        NnsslError: the file is missing or not JSON, naming it.
    """
    try:
        return json.loads(Path(source).read_text())
    except OSError as error:
        raise NnsslError(f"cannot read {source}: {error}", "check the path") from error
    except json.JSONDecodeError as error:
        raise NnsslError(f"{source} is not valid JSON: {error}", "restore or re-create the file") from error


def sha256(source: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with open(source, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
