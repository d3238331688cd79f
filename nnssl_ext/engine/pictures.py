"""Pictures of what a method does with the same few cases, drawn again and again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from nnssl_ext.contracts import Method
from nnssl_ext.data.loader import make_loader
from nnssl_ext.engine.job import Job
from nnssl_ext.reports.pictures import draw_planes
from nnssl_ext.views.cut import cut_views

PICTURE_SEED = 20_000_003
"""A data stream of its own, so the pictured crops and masks stay the same through a run and between runs."""


@torch.no_grad()
def draw_pictures(job: Job, method: Method, device: torch.device, png: Path) -> None:
    """Draw the first sample of the picture stream in three planes, one column per named volume of the method."""
    batch = next(
        iter(make_loader(job.cases, method.view_policy, seed=PICTURE_SEED, start_step=0, steps=1, batch_size=1))
    )
    volumes = method.pictures(cut_views(batch, device))
    draw_planes({name: _array(v[0]) for name, v in volumes.items()}, png, job.plan.spacing)


def _array(volume: Shaped[Tensor, "C Z Y X"]) -> Shaped[np.ndarray, "C Z Y X"]:
    """Colours (uint8) as they are, everything else as float32."""
    return (volume if volume.dtype == torch.uint8 else volume.float()).cpu().numpy()
