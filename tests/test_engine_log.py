"""The training log: means of what steps and processes tell; rows of a run that goes on stay as they were."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from nnssl_ext.engine.log import TrainingLog, open_tracker
from nnssl_ext.engine.loop import _add, _means
from nnssl_ext.files import read_json
from nnssl_ext.records import Step


def row(epoch: int) -> dict[str, float | int]:
    return {"epoch": epoch, "step": 25 * (epoch + 1), "loss": 1 / (epoch + 3), "lr": 1e-5, "seconds": 2.0}


def test_a_run_that_goes_on_keeps_its_rows_to_the_letter(tmp_path):
    sent = []
    log = TrainingLog(tmp_path, 0, sent.append)
    for epoch in range(3):
        log.add(row(epoch))
    whole = log.path.read_bytes()
    again = TrainingLog(tmp_path, 2, sent.append)  # the checkpoint is of two epochs: the third is run again
    assert again.rows == [row(0), row(1)]
    again.add(row(2))
    assert again.path.read_bytes() == whole
    assert sent == [row(0), row(1), row(2), row(2)]


def test_a_run_that_begins_anew_keeps_nothing(tmp_path):
    TrainingLog(tmp_path, 0, lambda row: None).add(row(7))
    log = TrainingLog(tmp_path, 0, lambda row: None)
    log.add(row(0))
    assert log.path.read_text().count("\n") == 2


def step(loss: float, **terms: float) -> Step:
    return Step(torch.tensor(loss), {name: torch.tensor(value) for name, value in terms.items()}, {})


def test_means_are_over_the_steps_that_tell_a_figure():
    sums = {}
    _add(sums, [step(2.0, hidden=0.5), step(4.0, grad_norm=3.0)])  # two micro-batches, and then two more
    _add(sums, [step(6.0), step(8.0, hidden=0.7, grad_norm=5.0)])
    totals = {name: (float(total), count) for name, (total, count) in sums.items()}
    found = _means(totals, 1)
    assert found == pytest.approx({"loss": 5.0, "hidden": 0.6, "grad_norm": 4.0})


TWO = """
import json, sys
import torch.distributed as dist
from nnssl_ext.engine.loop import _means
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
mine = [{"loss": (6.0, 2), "hidden": (1.0, 1)}, {"other": (5.0, 2), "loss": (2.0, 2)}][rank]
with open(f"{folder}/{rank}.json", "w") as file:
    json.dump(_means(mine, 2), file)
dist.destroy_process_group()
"""


def test_processes_need_not_tell_the_same_figures(tmp_path):
    both = [subprocess.Popen([sys.executable, "-c", TWO, str(rank), str(tmp_path)]) for rank in (0, 1)]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    for rank in (0, 1):
        assert read_json(tmp_path / f"{rank}.json") == {"loss": 2.0, "hidden": 1.0, "other": 2.5}


def test_a_run_that_goes_on_goes_on_at_wandb_too(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **options: asked.append(options)))
    for output in (tmp_path / "one", tmp_path / "one", tmp_path / "two"):
        output.mkdir(exist_ok=True)
        open_tracker("wandb", output, {})
    assert asked[0]["id"] == asked[1]["id"] != asked[2]["id"]
