"""The console commands of this environment."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from nnssl_ext.errors import NnsslError


def program(name: str) -> str:
    """The console script of this very environment, whether or not it is activated.

    Raises:
        NnsslError: it is not installed.
    """
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if not found:
        raise NnsslError(f"the command {name} is not installed beside {sys.executable}", "pip install nnssl-ext")
    return found
