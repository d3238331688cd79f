"""A registered pair as volumes to look at, all on the common grid."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from nnssl_ext.registration.images import place
from nnssl_ext.registration.pipeline import Registration
from nnssl_ext.registration.warp import warp


def overview(result: Registration) -> dict[str, Any]:
    """The arguments of `nnssl_ext.reports.registration.draw_overview` but the file."""
    displacement = result.field.displacement_voxels.float().cpu()
    fixed = place(result.fixed.image, result.grid).astype(np.float32)
    before = place(result.moving.image, result.grid, result.initial).astype(np.float32)
    after = warp(torch.from_numpy(before)[None], displacement)[0].numpy()
    return {
        "fixed": fixed,
        "before": before,
        "after": after,
        "displacement_mm": result.field.displacement_mm.float().cpu().numpy(),
        "features": (result.features[0], warp(result.features[1], displacement)),
        "spacing": result.grid.spacing,
    }
