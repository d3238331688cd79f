"""Folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nnssl_ext.errors import NnsslError


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yield a hidden folder beside `target`; on success rename it to `target`, on any failure delete it.

    SIGTERM counts as failure. SIGKILL cannot be seen; what it left is deleted by the next call for the same target, and
    until then nnU-Net does not find it.

    Raises:
        NnsslError: the place cannot be written, or `target` came into being meanwhile.
    """
    mark = f".{target.name}.partial-{socket.gethostname()}-"
    building = target.parent / f"{mark}{os.getpid()}"
    terminated = _exit_on_sigterm()
    try:
        building.parent.mkdir(parents=True, exist_ok=True)
        for left in target.parent.glob(f"{mark}*"):
            process = left.name.removeprefix(mark)  # of a host whose name goes on, it is no number
            if process.isdecimal() and (int(process) == os.getpid() or not _alive(int(process))):
                shutil.rmtree(left, ignore_errors=True)
        building.mkdir()
        yield building
        if target.exists():
            raise NnsslError(f"{target} came into being meanwhile", "remove it or choose another target")
        os.rename(building, target)
    except OSError as error:
        raise cannot_write(target, error) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
        if terminated:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def cannot_write(target: Path, reason: object) -> NnsslError:
    """The error for a full disk, missing rights and the like, naming how much room is left."""
    place = next((p for p in (target, *target.parents) if p.exists()), Path("/"))
    free = shutil.disk_usage(place).free / 2**30
    return NnsslError(
        f"cannot write {target}: {reason} ({free:.1f} GiB free)", "free space there, or make the folder writable"
    )


def _exit_on_sigterm() -> bool:
    """Turn SIGTERM into SystemExit, so that clean-up runs; False where a handler is in place already."""
    usual = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if not usual or threading.current_thread() is not threading.main_thread():
        return False
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    return True


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
