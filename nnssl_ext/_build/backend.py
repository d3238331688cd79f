"""setuptools' build backend, plus two files at the root of site-packages that run our start-up hook.

setuptools cannot place files there by configuration. ``.pth`` serves Python up to 3.17; ``.start`` (PEP 829) takes over
from 3.15 on. `install` tolerates being called by both.
"""

from __future__ import annotations

import base64
import hashlib
import os
import zipfile
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_sdist,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

STARTUP_FILES = {
    "nnssl_ext.pth": b"import nnssl_ext.nnunet_plugin.startup; nnssl_ext.nnunet_plugin.startup.install()\n",
    "nnssl_ext.start": b"nnssl_ext.nnunet_plugin.startup:install\n",
}


def build_wheel(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    name = build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)
    add_startup_files(Path(wheel_directory, name))
    return name


def build_editable(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    name = build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
    add_startup_files(Path(wheel_directory, name))
    return name


def add_startup_files(wheel: Path) -> None:
    """Rewrite `wheel` with `STARTUP_FILES` at its root and in its RECORD, so that uninstalling removes them."""
    rewritten = wheel.with_suffix(".rewritten")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(rewritten, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            content = old.read(entry)
            if entry.filename.endswith(".dist-info/RECORD"):
                content += "".join(map(record_line, STARTUP_FILES)).encode()
            new.writestr(entry, content)
        for name, content in STARTUP_FILES.items():
            new.writestr(name, content)
    os.replace(rewritten, wheel)


def record_line(name: str) -> str:
    content = STARTUP_FILES[name]
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    return f"{name},sha256={digest},{len(content)}\n"
