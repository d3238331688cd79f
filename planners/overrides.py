"""What a user may fix by hand, checked before anything is planned from it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from nnssl_ext.errors import NnsslError
from nnssl_ext.records import Size


@dataclass(frozen=True)
class Overrides:
    """What a user fixes by hand; None leaves it to the planner. Sizes in voxels z, y, x; window in Hounsfield units.

    Raises:
        NnsslError: a patch or batch size below 1.
    """

    token_size: Size | None = None
    patch_size: Size | None = None
    batch_size: int | None = None
    window: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.patch_size is not None and min(self.patch_size) < 1:
            raise NnsslError(
                f"--patch_size {_spaced(self.patch_size)}", "give at least one voxel per axis, e.g. 96 96 96"
            )
        if self.batch_size is not None and self.batch_size < 1:
            raise NnsslError(f"--batch_size {self.batch_size}", "give at least 1, or leave it to the planner")


def check_options(
    memory_gb: float | None, plans_name: str | None, target_spacing: Sequence[int | float] | None
) -> None:
    """What nnU-Net's planning commands, and ours, hand to a planner.

    Raises:
        NnsslError: a value that nothing can be planned from, naming the flag that gave it.
    """
    if memory_gb is not None and not 0 < memory_gb < math.inf:
        raise NnsslError(f"-gpu_memory_target {memory_gb:g}", "give gigabytes above 0, e.g. 8")
    if plans_name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", plans_name):
        raise NnsslError(
            f"-overwrite_plans_name '{plans_name}' cannot be a file name", "use letters, digits, '.', '_' and '-'"
        )
    if target_spacing is not None and not all(0 < edge < math.inf for edge in target_spacing):
        raise NnsslError(f"-overwrite_target_spacing {_spaced(target_spacing)}", "give mm above 0, e.g. 1 1 1")


def _spaced(values: Sequence[int | float]) -> str:
    return " ".join(f"{value:g}" for value in values)
