"""How fast a machine reads, augments and trains. Every phase is timed several times after a warm-up.

`nnssl_benchmark throughput` writes the result as JSON; ``docs/throughput.md`` holds measured examples.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from tqdm import tqdm

from nnssl_ext.contracts import Progress, TokenBackbone
from nnssl_ext.data.loader import make_loader
from nnssl_ext.data.regions import read_region
from nnssl_ext.engine.devices import launch
from nnssl_ext.engine.job import Job
from nnssl_ext.engine.loop import assemble
from nnssl_ext.engine.method import build_method
from nnssl_ext.engine.optim import clip_gradients
from nnssl_ext.engine.state import TrainState
from nnssl_ext.engine.step import Parts, optimizer_step
from nnssl_ext.errors import NnsslError
from nnssl_ext.objectives.reconstruction import unpatchify
from nnssl_ext.records import Case, Size
from nnssl_ext.reports.machine import peak_memory
from nnssl_ext.views.cut import cut_views
from nnssl_ext.views.policies import IntensitySettings, SingleView, SpatialSettings, draw_centre

EVERYTHING = (
    SpatialSettings(flip=(1.0, 1.0, 1.0), rotation=1.0, zoom=1.0),
    IntensitySettings(
        noise=1.0, blur=1.0, brightness=1.0, contrast=1.0, low_resolution=1.0, gamma_inverted=1.0, gamma=1.0
    ),
)
"""Each augmentation in every sample; nnU-Net's probabilities draw this combination about once in a million."""


@dataclass
class Stopwatch:
    """Seconds per named phase, waiting for the device at the end of each."""

    device: torch.device
    wall: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    cpu: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what is done inside."""
        start, cpu_start = time.perf_counter(), time.process_time()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()
        self.wall[name].append(time.perf_counter() - start)
        self.cpu[name].append(time.process_time() - cpu_start)

    def summary(self) -> dict[str, dict[str, float]]:
        """Median, mean and extremes per phase, of wall-clock time and of CPU time of all threads.

        The extremes, and CPU time below wall time, say how busy the machine was with other things.
        """
        return {
            name: {**_summary(self.wall[name]), **{f"cpu_{k}": v for k, v in _summary(self.cpu[name]).items()}}
            for name in self.wall
        }


def measure_data(cases: tuple[Case, ...], size: Size, device: torch.device, repeats: int) -> dict[str, Any]:
    """Seconds per case, at one case a time: reading one plain crop, and cutting views.

    Returns:
        ``read``: one crop that lies inside its case, from the disk cache. ``as_drawn``: flip, rotation, zoom and intensity
        with nnU-Net's probabilities (the mean counts). ``everything``: all of them in every sample. Turned and zoomed
        views need larger regions, so reading is timed for both too.
    """
    watch = Stopwatch(device)
    rng = np.random.default_rng(0)
    for number in range(repeats + len(cases)):  # first every case once, into the disk cache
        case = cases[number % len(cases)]
        if number < len(cases):
            read_region(case, (0, 0, 0), case.shape)
            continue
        corner = draw_centre(case.shape, size, np.ones(3), rng) - (np.asarray(size) - 1) / 2
        lower = np.maximum(corner, 0).astype(int)
        low: Size = (int(lower[0]), int(lower[1]), int(lower[2]))
        with watch.phase("read"):
            read_region(case, low, (low[0] + size[0], low[1] + size[1], low[2] + size[2]))
    policies = {
        "as_drawn": (SingleView(size, None, SpatialSettings(), IntensitySettings()), 5 * repeats),
        "everything": (SingleView(size, None, *EVERYTHING), repeats),
    }
    for name, (policy, number) in policies.items():
        batches = iter(make_loader(cases, policy, seed=0, start_step=0, steps=number + 1, batch_size=1))
        cut_views(next(batches), device)
        for _ in tqdm(range(number), name, leave=False):
            with watch.phase(f"read_{name}"):
                batch = next(batches)
            with watch.phase(f"views_{name}"):
                cut_views(batch, device)
    return {"size": list(size), "seconds_per_case": watch.summary()}


def measure_steps(job: Job, repeats: int, warm_up: int = 2) -> dict[str, Any]:
    """Seconds per step of a job, phase by phase, and of the whole step as training does it.

    Returns:
        ``seconds``: per phase (``read``, ``views``, ``forward``, ``backward``, ``optimizer``) and ``step``, which is
        everything but reading, as the loop runs it; also ``match``, the part of ``forward`` in which methods that compare
        voxels find them. ``step_over_passes``: the step over forward and backward, in wall-clock
        and in CPU time: what views, optimiser, teacher and the host add. ``cases_per_s``: of reading and step together, in
        one process without reading workers. ``peak_memory_gb``: of the device, or of this process since its start on a CPU.
    """
    parts = assemble(launch(job.run), job, build_method(job))
    return {"settings": _sizes(job, parts), **_time_steps(parts, repeats, warm_up)}


def measure_visible_against_all(job: Job, repeats: int, warm_up: int = 1) -> dict[str, Any]:
    """The masked autoencoder's step, and the same step with all tokens going through the encoder.

    The second replaces hidden tokens by the backbone's mask token, encodes all of them and gives all to the same decoder:
    batch, views, decoder, target, loss and optimiser are the same.

    Raises:
        NnsslError: the job is no masked autoencoding of visible tokens.
    """
    parts = assemble(launch(job.run), job, build_method(job))
    reconstruct = getattr(parts.method, "reconstruct", None)
    if not (isinstance(getattr(reconstruct, "backbone", None), TokenBackbone) and hasattr(reconstruct, "decoder")):
        raise NnsslError(
            f"{job.method} on {job.plan.preset} does not encode visible tokens only",
            "compare with -tr MAETrainer and a Primus backbone",
        )
    visible = _time_steps(parts, repeats, warm_up)["seconds"]["step"]
    parts.method.reconstruct = AllTokens(reconstruct)
    everything = _time_steps(parts, repeats, warm_up)["seconds"]["step"]
    return {
        "visible_tokens_step": visible,
        "all_tokens_step": everything,
        "speed_up": everything["median"] / visible["median"],
        "speed_up_in_cpu_time": everything["cpu_median"] / visible["cpu_median"],
    }


class AllTokens(nn.Module):
    """Stands in for a masked autoencoder's network of visible tokens: the same parts, with every token encoded."""

    def __init__(self, visible: Any) -> None:
        super().__init__()
        self.backbone = visible.backbone
        self.decoder = visible.decoder

    def forward(
        self, voxels: Float[Tensor, "B C Z Y X"], mask: Bool[Tensor, "B z y x"]
    ) -> tuple[Float[Tensor, "B C Z Y X"], Float[Tensor, "B E"]]:
        """The predicted volume and the summary."""
        features = self.backbone.forward_features(voxels, mask)
        (tokens,) = features.levels
        z, y, x = tokens.shape[2:]
        everyone = torch.arange(z * y * x, device=tokens.device).expand(len(tokens), -1)
        prediction = self.decoder(tokens.flatten(2).transpose(1, 2), everyone, (z, y, x))
        return unpatchify(prediction, self.backbone.token_size, (z, y, x)), features.summary


def _time_steps(parts: Parts, repeats: int, warm_up: int) -> dict[str, Any]:
    job, device = parts.job, parts.fabric.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    number = warm_up + 2 * repeats
    batches = iter(
        make_loader(
            job.cases, parts.method.view_policy, seed=0, start_step=0, steps=number, batch_size=job.run.batch_size
        )
    )
    state = TrainState()
    for batch in tqdm(islice(batches, warm_up), "warm-up", warm_up, leave=False):
        optimizer_step(parts, [batch], state)
    watch = Stopwatch(device)
    for _ in tqdm(range(repeats), "steps", leave=False):  # phases and whole steps in turn: both meet the same machine
        with watch.phase("read"):
            batch = next(batches)
        _step_by_phase(parts, batch, watch)
        with watch.phase("read"):
            batch = next(batches)
        with watch.phase("step"):
            optimizer_step(parts, [batch], state)
    seconds = watch.summary()
    peak = peak_memory(device)
    together = seconds["read"]["median"] + seconds["step"]["median"]
    return {
        "seconds": seconds,
        "step_over_passes": {
            clock: round(seconds["step"][m] / (seconds["forward"][m] + seconds["backward"][m]), 3)
            for clock, m in (("wall", "median"), ("cpu", "cpu_median"))
        },
        "cases_per_s": job.run.batch_size / together,
        "peak_memory_gb": None if peak is None else round(peak / 1e9, 3),
    }


def _step_by_phase(parts: Parts, batch: Any, watch: Stopwatch) -> None:
    """`nnssl_ext.engine.step.optimizer_step` on one batch, phase by phase."""
    parts.schedule.apply(parts.optimizer, 0)
    parts.optimizer.zero_grad(set_to_none=True)
    parts.method.before_step(Progress(0, parts.job.total_steps))
    with watch.phase("views"):
        views = cut_views(batch, parts.fabric.device)
    if hasattr(parts.method, "match"):
        with watch.phase("match"):
            parts.method.match(views)
    with watch.phase("forward"):
        loss, _ = parts.graph(views)
    with watch.phase("backward"):
        parts.fabric.backward(loss)
    with watch.phase("optimizer"):
        clip_gradients(parts.method, parts.job.settings.optim)
        parts.optimizer.step()
        parts.method.after_step(Progress(1, parts.job.total_steps))


def _sizes(job: Job, parts: Parts) -> dict[str, Any]:
    network = parts.method.export_backbone().network
    return {
        "method": job.method,
        "preset": job.plan.preset,
        "plans": job.plan.plans_name,
        "crop": list(job.plan.global_crop),
        "channels": job.plan.channels,
        "batch_size": job.run.batch_size,
        "precision": job.run.precision,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
    }


def _summary(times: list[float]) -> dict[str, float]:
    figures = {
        "median": statistics.median(times),
        "mean": statistics.fmean(times),
        "min": min(times),
        "max": max(times),
    }
    return {name: round(value, 5) for name, value in figures.items()}
