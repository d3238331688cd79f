"""The pretraining loop. It knows devices, files and time; it knows nothing about any method."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, product
from typing import cast

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch.nn.utils import get_total_norm
from tqdm import tqdm

from nnssl_ext.checkpoints.io import save_checkpoint
from nnssl_ext.contracts import Method, Monitor
from nnssl_ext.data.loader import RegionBatch, make_loader
from nnssl_ext.engine.devices import launch, on_first
from nnssl_ext.engine.faults import Faults
from nnssl_ext.engine.job import BEST, FINAL, LATEST, Job, prepare
from nnssl_ext.engine.log import TrainingLog, open_tracker
from nnssl_ext.engine.method import Beginning, begin, build_method
from nnssl_ext.engine.optim import Schedule, build_optimizer
from nnssl_ext.engine.pictures import draw_pictures
from nnssl_ext.engine.probing import OnlineProbe, open_probe
from nnssl_ext.engine.signals import StopRequest, stop_on_signal
from nnssl_ext.engine.state import TrainState, data_seed, export, load_latest, save_latest
from nnssl_ext.engine.step import Parts, StepGraph, optimizer_step
from nnssl_ext.files import write_json
from nnssl_ext.monitors.standard import standard_monitors
from nnssl_ext.records import Step
from nnssl_ext.reports.run_report import write_run_report


@dataclass
class Watch:
    """What observes a run on this process: monitors, the record of non-finite steps, the request to stop; on the first
    process of a run on labelled data also the probe."""

    monitors: list[Monitor]
    faults: Faults
    stop: StopRequest
    probe: OnlineProbe | None


def assemble(fabric: Fabric, job: Job, method: nn.Module) -> Parts:
    """The method, its optimiser and their wrapping for this process."""
    method = method.to(fabric.device)
    if job.run.compile:
        functorch_config.donated_buffer = False  # one graph gives the gradients of the loss and of its terms
        method.compile()
    graph = StepGraph(method, autocast=job.run.precision == "bf16")
    optim = job.settings.optim
    wrapped, optimizer = fabric.setup(graph, build_optimizer(method, optim, cast(Method, method).optim_rules))
    schedule = Schedule(optim, job.total_steps, job.run.batch_size * fabric.world_size * optim.accumulate)
    return Parts(fabric, job, method, wrapped, optimizer, schedule)


def pretrain(job: Job, resume: bool = False) -> bool:
    """Carry out a run, from its start or from its latest checkpoint.

    Args:
        job: what to do.
        resume: continue an earlier run if the folder holds one.

    Returns:
        True when the run is complete, False when a signal stopped it (it can be continued).

    Raises:
        NnsslError: settings that differ from those of the run to be continued, or non-finite steps past the budget.
    """
    fabric = launch(job.run)
    found = bool(fabric.broadcast(on_first(fabric, lambda: prepare(job, resume, fabric.world_size))))
    beginning = Beginning(build_method(job)) if found else begin(job)
    parts = assemble(fabric, job, beginning.method)
    state = TrainState(origin=beginning.origin, weight_norm=_norm(parts.method))
    if found:
        state = load_latest(job.output / LATEST, parts.method, parts.optimizer)
    fabric.print(job.about(fabric.world_size) + (f"\ncontinuing at step {state.step}" if found else ""))
    if beginning.table and fabric.is_global_zero:
        fabric.print(f"starting from {job.run.pretrained_weights}: {beginning.table}")
        write_json(job.output / "transfer.json", {**beginning.origin, **beginning.table.as_json()})
    done = state.step // job.settings.iterations
    log = on_first(
        fabric, lambda: TrainingLog(job.output, done, open_tracker(job.run.tracker, job.output, job.as_json()))
    )
    probe = on_first(fabric, lambda: open_probe(job, parts.method, fabric.device))
    with stop_on_signal() as stop:
        watch = Watch(standard_monitors(), Faults(job.run.max_skipped), stop, probe)
        batches = stream(parts, state)
        while state.step < job.total_steps:
            figures = train_epoch(parts, state, watch, batches)
            if watch.faults.spent:
                state = roll_back(parts, state, watch.faults)
                batches = stream(parts, state)
            elif state.step % job.settings.iterations == 0:
                close_epoch(parts, state, watch, figures, log)
            if _agreed(fabric, stop) and state.step < job.total_steps:
                save(parts, state)
                fabric.print(f"stopped by {stop.signal_name or 'a signal'} after step {state.step}; --c continues")
                return False
    if fabric.is_global_zero:
        save_checkpoint(job.output / FINAL, export(job, parts.method, state))
        draw_pictures(job, parts.method, fabric.device, job.output / "reconstruction_final.png")
    if log is not None:
        write_run_report(job.output, log.findings)
    fabric.print(f"finished: {job.output / FINAL}")
    fabric.barrier()
    return True


def stream(parts: Parts, state: TrainState) -> Iterator[RegionBatch]:
    """This process's batches from where the run stands to its end; readers live as long as the stream."""
    job, fabric = parts.job, parts.fabric
    loader = make_loader(
        job.cases,
        parts.method.view_policy,
        seed=data_seed(job.run.seed, state.attempt),
        start_step=state.step * job.settings.optim.accumulate,
        steps=(job.total_steps - state.step) * job.settings.optim.accumulate,
        batch_size=job.run.batch_size,
        rank=fabric.global_rank,
        world_size=fabric.world_size,
        accumulate=job.settings.optim.accumulate,
        workers=job.run.workers,
        pin_memory=fabric.device.type == "cuda",
    )
    return iter(loader)


def train_epoch(parts: Parts, state: TrainState, watch: Watch, batches: Iterator[RegionBatch]) -> dict[str, float]:
    """Train to the end of the current epoch, or until asked to stop, or until the budget of non-finite steps is spent.

    Returns:
        Mean figures of the epoch so far; their sums stay in ``state.sums`` when the epoch is not complete.
    """
    job, fabric = parts.job, parts.fabric
    todo = job.settings.iterations - state.step % job.settings.iterations
    sums = {name: (torch.tensor(total, device=fabric.device), count) for name, (total, count) in state.sums.items()}
    start, waited = time.perf_counter(), 0.0
    parts.graph.train()
    title = f"epoch {state.step // job.settings.iterations + 1}/{job.settings.epochs}"
    for done in tqdm(range(1, todo + 1), title, disable=None if fabric.is_global_zero else True, leave=False):
        before = time.perf_counter()
        micro_batches = list(islice(batches, job.settings.optim.accumulate))
        waited += time.perf_counter() - before
        steps = optimizer_step(parts, micro_batches, state)
        if steps is None:
            state.skipped += 1
            tqdm.write(watch.faults.note(state.step, micro_batches))
            if watch.faults.spent:
                break
        else:
            _add(sums, steps)
            for step, monitor in product(steps, watch.monitors):
                monitor.see(step)
        if done < todo and _agreed(fabric, watch.stop):
            break
    elapsed = time.perf_counter() - start
    state.sums = {name: (float(total), count) for name, (total, count) in sums.items()}
    cases = done * job.settings.optim.accumulate * job.run.batch_size * fabric.world_size
    return {**_means(state.sums, fabric.world_size), "cases_per_s": cases / elapsed, "data_wait": waited / elapsed}


def close_epoch(
    parts: Parts, state: TrainState, watch: Watch, figures: dict[str, float], log: TrainingLog | None
) -> None:
    """Log a complete epoch, draw pictures when due, and save; a lower loss than ever also becomes the best checkpoint."""
    job = parts.job
    epoch = state.step // job.settings.iterations - 1
    row: dict[str, float | int] = {"epoch": epoch, "step": state.step, **figures, **state.comparison}
    state.sums, state.comparison = {}, {}
    watch.faults.forget()
    row["lr"] = parts.schedule.learning_rate(state.step - 1)
    row["weight_decay"] = parts.schedule.weight_decay(state.step - 1)
    before, state.weight_norm = state.weight_norm, _norm(parts.method)
    row["weight_norm"], row["weight_growth"] = state.weight_norm, state.weight_norm / before
    row["skipped"] = state.skipped
    for monitor in watch.monitors:
        row.update(monitor.say())
    better = figures.get("loss", float("inf")) < state.best
    state.best = min(state.best, figures.get("loss", float("inf")))
    news: list[str] = []
    if log is not None:
        if better:
            save_checkpoint(job.output / BEST, export(job, parts.method, state))
        if watch.probe is not None:
            row.update(watch.probe.figures(epoch, parts.method))
        news = log.add(row)
        if job.run.picture_epochs and epoch % job.run.picture_epochs == 0:
            draw_pictures(job, parts.method, parts.fabric.device, job.output / f"reconstruction_{epoch:04d}.png")
            write_run_report(job.output, log.findings)
    # After the log: a run killed in between repeats the epoch, and its row is replaced; a row that is missing stays so.
    save(parts, state)
    shown = {name: value for name, value in row.items() if name not in ("epoch", "step")}
    parts.fabric.print(f"epoch {epoch + 1}: " + ", ".join(f"{name} {value:.4g}" for name, value in shown.items()))
    for line in news:
        parts.fabric.print(line)


def save(parts: Parts, state: TrainState) -> None:
    """Write the resumable checkpoint (the first process does, the others wait)."""
    if parts.fabric.is_global_zero:
        save_latest(parts.job.output / LATEST, parts.job, parts.method, parts.optimizer, state)
    parts.fabric.barrier()


def roll_back(parts: Parts, state: TrainState, faults: Faults) -> TrainState:
    """Return to the last good checkpoint, with another stream of batches.

    Raises:
        NnsslError: the run already rolled back to this checkpoint: a diagnosis with cases and remedy.
    """
    job = parts.job
    latest = job.output / LATEST
    lr = parts.schedule.learning_rate(state.step - 1)
    if latest.exists():
        restored = load_latest(latest, parts.method, parts.optimizer)
    else:
        parts.method.load_state_dict(begin(job).method.state_dict())
        restored = TrainState(origin=state.origin, weight_norm=_norm(parts.method))
        parts.optimizer.state.clear()
    if state.rollback_step == restored.step:
        raise faults.of_all(parts.fabric.world_size).diagnosis(lr, job.run.precision)
    parts.fabric.print(f"more than {faults.budget} non-finite steps: rolling back to step {restored.step}")
    restored.attempt, restored.rollback_step = state.attempt + 1, restored.step
    restored.skipped = state.skipped
    faults.forget()
    return restored


def _add(sums: dict[str, tuple[Tensor, int]], steps: list[Step]) -> None:
    """Add the figures of one optimiser step, on the device, and how often each was told."""
    for step in steps:
        for name, value in {"loss": step.loss.detach(), **step.terms}.items():
            total, count = sums.get(name, (torch.zeros_like(value, dtype=torch.float32), 0))
            sums[name] = total + value.float(), count + 1


def _means(sums: dict[str, tuple[float, int]], processes: int) -> dict[str, float]:
    """Means over the steps and processes that told a figure; not all of them tell all."""
    everyone: list[dict[str, tuple[float, int]]] = [sums]
    if processes > 1:
        everyone = [{}] * processes
        torch.distributed.all_gather_object(everyone, sums)
    told: dict[str, list[tuple[float, int]]] = {}
    for name, figure in (item for one in everyone for item in one.items()):
        told.setdefault(name, []).append(figure)
    return {name: sum(total for total, _ in all_) / sum(count for _, count in all_) for name, all_ in told.items()}


def _norm(method: nn.Module) -> float:
    """Norm of all trainable weights."""
    weights = [parameter.detach() for parameter in method.parameters() if parameter.requires_grad]
    return float(get_total_norm(weights))


def _agreed(fabric: Fabric, stop: StopRequest) -> bool:
    """Whether any process was asked to stop."""
    if fabric.world_size == 1:
        return bool(stop)
    return bool(fabric.all_reduce(torch.tensor(float(bool(stop)), device=fabric.device), reduce_op="max"))
