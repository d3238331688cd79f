"""Runs through the loop: every method on every backbone, interrupted, resumed, replicated, and with bad data."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import blosc2
import numpy as np
import pytest
import torch
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from tiny_dataset import BACKBONES, CONFIGURATION, DATASET, job_of, log_of, weights_of, write_dataset

from nnssl_ext.catalogue import pretraining_methods
from nnssl_ext.checkpoints.io import load_checkpoint
from nnssl_ext.engine import loop
from nnssl_ext.engine.devices import launch
from nnssl_ext.engine.job import Job, prepare
from nnssl_ext.engine.settings import RunSettings
from nnssl_ext.errors import NnsslError
from nnssl_ext.files import read_json, write_json

EVERY_PAIR = [(method, backbone) for method in pretraining_methods() for backbone in BACKBONES]
COMPARABLE = {
    "DINO3DTrainer": ("--head.prototypes", "64", "--teacher.patch_centring", "centre", "--freeze_last_layer", "1"),
    "HierarchicalDenseTrainer": ("--contrast.voxels", "64", "--width", "8"),
    "IBOTTrainer": ("--head.prototypes", "64", "--freeze_last_layer", "1"),
    "RegistrationTrainer": ("--refinement", "0", "--places", "64", "--layer.search", "2"),  # Adam blows rounding up
    "SimSiamTrainer": ("--projector_dim", "32", "--predictor_dim", "16"),
    "Vox2VecTrainer": ("--contrast.voxels", "64"),
}
"""Settings with which batches of a method add up, and with which a few steps move all of it."""
NEEDS_WHOLE_BATCHES = {"HierarchicalDenseTrainer", "SimSiamTrainer", "Vox2VecTrainer"}
"""Methods with batch norm, whose statistics are those of a micro-batch over all processes."""


@pytest.fixture
def dataset(nnunet_env):
    return write_dataset(nnunet_env.preprocessed)


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


class Killed(Exception):
    """Stands for a crash."""


def crash_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    real = loop.optimizer_step

    def dying(parts, micro_batches, state):
        if state.step == step:
            raise Killed
        return real(parts, micro_batches, state)

    monkeypatch.setattr(loop, "optimizer_step", dying)


@pytest.mark.parametrize(("method", "backbone"), EVERY_PAIR)
def test_every_method_trains_and_continues_exactly_after_a_crash(dataset, monkeypatch, tmp_path, method, backbone):
    flags = ("--epochs", "3", "--iterations", "2", "--picture_epochs", "2")
    whole = job_of(*flags, method=method, backbone=backbone)
    assert loop.pretrain(whole)
    monkeypatch.setenv("nnssl_results", str(tmp_path / "again"))
    broken = job_of(*flags, method=method, backbone=backbone)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        crash_at(patch, step=3)  # in the middle of the second epoch
        loop.pretrain(broken)
    assert loop.pretrain(broken, resume=True)
    assert_same(weights_of(whole), weights_of(broken), 0)
    columns = ("epoch", "step", "loss", "grad_norm", "lr")
    rows = [[{c: float(r[c]) for c in columns} for r in log_of(job)] for job in (whole, broken)]
    assert rows[0] == rows[1]
    assert [float(row["step"]) for row in rows[0]] == [2, 4, 6]
    for name in ("progress.png", "reconstruction_0000.png", "reconstruction_final.png", "settings.json", "plans.json"):
        assert (whole.output / name).stat().st_size > 0
    assert_stock_nnunet_loads(whole)


def assert_stock_nnunet_loads(job: Job) -> None:
    """nnU-Net's loader of pretrained weights takes all but the heads into a network of other classes."""
    entry = job.plans["configurations"][CONFIGURATION]["architecture"]
    network = get_network_from_plans(
        entry["network_class_name"], entry["arch_kwargs"], entry["_kw_requires_import"], 1, 5, deep_supervision=True
    )
    load_pretrained_weights(network, str(job.output / "checkpoint_final.pth"))
    wanted, loaded = weights_of(job), network.state_dict()
    assert wanted.keys() == loaded.keys()
    for name, value in wanted.items():
        assert ".seg_layers." in name or torch.equal(loaded[name], value), name


def test_pictures_only_at_the_end(dataset):
    job = job_of("--epochs", "2", "--iterations", "1", "--picture_epochs", "0")
    assert loop.pretrain(job)
    assert [path.name for path in job.output.glob("reconstruction_*")] == ["reconstruction_final.png"]


def test_weights_move_and_checkpoints_hold_what_was_trained(dataset):
    job = job_of("--epochs", "1", "--iterations", "2")
    fresh = loop.build_method(job).export_backbone().network.state_dict()
    assert loop.pretrain(job)
    content = load_checkpoint(job.output / "checkpoint_final.pth")
    trained = content["network_weights"]
    moved = {name for name in fresh if not torch.equal(fresh[name], trained[name])}
    assert any(name.startswith("eva.blocks") for name in moved)
    assert set(content["nnssl_ext"]["not_pretrained"]).isdisjoint(moved)
    assert "resume" not in content
    assert "resume" in load_checkpoint(job.output / "checkpoint_latest.pth")


def test_a_run_is_not_overwritten_and_changed_settings_are_named(dataset):
    flags = ("--epochs", "1", "--iterations", "1")
    assert loop.pretrain(job_of(*flags))
    with pytest.raises(NnsslError, match="already holds a run") as refused:
        loop.pretrain(job_of(*flags))
    assert "--c" in refused.value.fix
    with pytest.raises(NnsslError, match=r"settings.mask_ratio: was 0.75, now 0.5"):
        loop.pretrain(job_of(*flags, "--mask_ratio", "0.5"), resume=True)
    assert loop.pretrain(job_of(*flags, "--workers", "1"), resume=True)  # changes no batch


def test_another_world_size_is_refused_and_named(dataset, monkeypatch):
    """torchrun and SLURM decide it, not -num_gpus; settings files of before it was recorded still continue."""
    job = job_of("--epochs", "1", "--iterations", "1")
    assert loop.pretrain(job)
    recorded = read_json(job.output / "settings.json")
    assert recorded["world_size"] == 1
    assert prepare(job, resume=True, world_size=1)
    with pytest.raises(NnsslError, match="world_size: was 1, now 2"):
        prepare(job, resume=True, world_size=2)
    del recorded["world_size"]
    write_json(job.output / "settings.json", recorded)
    assert prepare(job, resume=True, world_size=8)
    with pytest.raises(NnsslError, match="world_size: was 8, now 1"):
        loop.pretrain(job, resume=True)


def test_plans_that_changed_are_refused_and_named(dataset):
    flags = ("--epochs", "1", "--iterations", "1")
    assert loop.pretrain(job_of(*flags))
    plans = dataset / "nnsslPrimusTinyPlans.json"
    content = read_json(plans)
    content["configurations"][CONFIGURATION]["batch_size"] += 1  # nnU-Net's, which pretraining does not read
    write_json(plans, content)
    assert loop.pretrain(job_of(*flags), resume=True)
    content["configurations"][CONFIGURATION]["spacing"] = [2.0, 2.0, 2.0]
    write_json(plans, content)
    with pytest.raises(NnsslError, match=r"plans.spacing: was \[1.0, 1.0, 1.0\], now \[2.0, 2.0, 2.0\]"):
        loop.pretrain(job_of(*flags), resume=True)


@pytest.mark.parametrize("resume", [True, False])
def test_a_finished_run_is_kept_though_its_resumable_checkpoint_is_gone(dataset, resume):
    job = job_of("--epochs", "1", "--iterations", "1")
    assert loop.pretrain(job)
    (job.output / "checkpoint_latest.pth").unlink()
    before = (job.output / "checkpoint_final.pth").read_bytes()
    with pytest.raises(NnsslError, match="already holds a finished run"):
        loop.pretrain(job, resume=resume)
    assert (job.output / "checkpoint_final.pth").read_bytes() == before


def test_what_the_first_process_refuses_ends_all_with_one_sentence(dataset):
    flags = ("--epochs", 1, "--iterations", 1, "-num_gpus", 2)
    assert subprocess.run(command(*flags), capture_output=True, timeout=300, check=False).returncode == 0
    again = subprocess.run(command(*flags), capture_output=True, text=True, timeout=300, check=False)
    assert again.returncode == 2
    assert "already holds a run" in again.stderr and "Traceback" not in again.stderr


def test_every_process_blames_the_case_that_one_of_them_read(dataset):
    poison(dataset, "case_03")
    flags = ("--epochs", 1, "--iterations", 12, "--batch_size", 1, "--max_skipped", 0, "-num_gpus", 2)
    done = subprocess.run(command(*flags), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "the preprocessed images of case_03 hold NaN or Inf" in done.stderr
    assert "the images are finite" not in done.stderr


@pytest.mark.parametrize(
    "started",
    [{"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "pretrain"}, {"LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "4"}],
)
def test_another_number_of_processes_than_was_started_is_refused(monkeypatch, started):
    for name, value in started.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(NnsslError, match="-num_gpus 2, but"):
        launch(RunSettings(batch_size=1, processes=2))


@pytest.mark.parametrize("method", sorted(pretraining_methods().keys() - NEEDS_WHOLE_BATCHES))
def test_gradient_accumulation_equals_one_large_batch(dataset, monkeypatch, tmp_path, method):
    no_random_depth(dataset)
    flags = ("--epochs", "1", "--iterations", "3", *SGD, *COMPARABLE.get(method, ()))
    large = job_of(*flags, "--batch_size", "4", method=method)
    assert loop.pretrain(large)
    monkeypatch.setenv("nnssl_results", str(tmp_path / "accumulated"))
    small = job_of(*flags, "--batch_size", "2", "--optim.accumulate", "2", method=method)
    assert loop.pretrain(small)
    assert_same(state_of(large), state_of(small), 1e-5)


SGD = ("--optim.optimizer", "sgd", "--optim.lr", "0.1", "--optim.warmup", "0")


def state_of(job: Job) -> dict[str, torch.Tensor]:
    """Everything a method holds: networks, heads, teacher, centres."""
    return load_checkpoint(job.output / "checkpoint_latest.pth")["resume"]["method"]


def no_random_depth(dataset: Path) -> None:
    plans = dataset / "nnsslPrimusTinyPlans.json"
    plans.write_text(plans.read_text().replace('"drop_path_rate": 0.1', '"drop_path_rate": 0.0'))


def command(*flags: object) -> list[str]:
    script = Path(sys.executable).parent / "nnssl_train"
    fixed = (DATASET, CONFIGURATION, "-p", "nnsslPrimusTinyPlans", "-device", "cpu")
    return [str(part) for part in (script, *fixed, *flags)]


@pytest.mark.parametrize(
    ("method", "backbone"),
    [pair if "Primus" in pair[1] else pytest.param(*pair, marks=pytest.mark.slow) for pair in EVERY_PAIR],
)
def test_two_processes_equal_one_with_double_batch(dataset, monkeypatch, tmp_path, method, backbone):
    no_random_depth(dataset)
    flags = ["--epochs", "1", "--iterations", "3", *SGD, *COMPARABLE.get(method, ())]
    one = job_of(*flags, "--batch_size", "4", method=method, backbone=backbone)
    assert loop.pretrain(one)
    monkeypatch.setenv("nnssl_results", str(tmp_path / "two"))
    two = job_of(*flags, "--batch_size", "2", method=method, backbone=backbone)
    several = command(*flags, "--batch_size", 2, "-num_gpus", 2, "-tr", method, "-p", f"nnssl{backbone}Plans")
    done = subprocess.run(several, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(state_of(one), state_of(two), 1e-5)
    first, second = (log_of(job)[0] for job in (one, two))
    for column in ("loss", "grad_norm", *(name for name in first if name.startswith(("grad_share", "grad_cosine")))):
        assert float(first[column]) == pytest.approx(float(second[column]), rel=1e-3, abs=1e-4), column


@pytest.mark.parametrize(
    ("number", "kill"), [(signal.SIGKILL, os.kill), (signal.SIGTERM, os.kill), (signal.SIGTERM, os.killpg)]
)
def test_a_killed_process_continues_with_the_same_curve(dataset, monkeypatch, tmp_path, number, kill):
    """A signal to the whole group reaches the process that reads, too."""
    flags = ("--epochs", 4, "--iterations", 30)
    whole = job_of(*map(str, flags))
    assert loop.pretrain(whole)
    monkeypatch.setenv("nnssl_results", str(tmp_path / "killed"))
    killed = replace(whole, output=job_of(*map(str, flags)).output)
    process = subprocess.Popen(
        command(*flags, "--workers", 1),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    latest = killed.output / "checkpoint_latest.pth"
    deadline = time.monotonic() + 120
    while not latest.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.1)  # into the next epoch
    kill(process.pid, number)
    output, _ = process.communicate(timeout=60)
    if number == signal.SIGTERM:
        assert process.returncode == 0, output
        assert "stopped by SIGTERM" in output
    assert not (killed.output / "checkpoint_final.pth").exists()
    again = subprocess.run(command(*flags, "--c"), capture_output=True, text=True, timeout=300, check=False)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "continuing at step" in again.stdout
    losses = [[float(row["loss"]) for row in log_of(job)] for job in (whole, killed)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert_same(weights_of(whole), weights_of(killed), 1e-5)


def poison(dataset: Path, case: str) -> None:
    path = dataset / "tiny_3d_fullres" / f"{case}.b2nd"
    shape = blosc2.open(str(path)).shape
    path.unlink()
    blosc2.asarray(np.full(shape, np.nan, np.float32), urlpath=str(path))


def test_non_finite_steps_are_skipped_and_counted_with_their_cases(dataset, capsys):
    poison(dataset, "case_03")
    job = job_of("--epochs", "2", "--iterations", "6", "--batch_size", "1", "--max_skipped", "50")
    assert loop.pretrain(job)
    assert float(log_of(job)[-1]["skipped"]) == 2  # each of the six cases once per epoch
    assert "case_03" in capsys.readouterr().out
    assert all(bool(torch.isfinite(value).all()) for value in weights_of(job).values())


def test_past_the_budget_the_run_rolls_back_once_and_then_names_the_cause(dataset, capsys):
    for case in ("case_02", "case_03", "case_04", "case_05"):
        poison(dataset, case)
    job = job_of("--epochs", "1", "--iterations", "40", "--batch_size", "1", "--max_skipped", "2")
    with pytest.raises(NnsslError, match="hold NaN or Inf") as ended:
        loop.pretrain(job)
    assert "rolling back" in capsys.readouterr().out
    assert any(name in ended.value.what for name in ("case_02", "case_03", "case_04", "case_05"))
    assert "--cases" in ended.value.fix


def test_only_the_named_cases_are_read(dataset, tmp_path):
    names = tmp_path / "cases.txt"
    names.write_text("case_01\ncase_04\n")
    job = job_of("--epochs", "1", "--iterations", "1", "--cases", str(names))
    assert [case.identifier for case in job.cases] == ["case_01", "case_04"]
    names.write_text("case_01\ncase_O4\n")
    with pytest.raises(NnsslError, match="case_O4"):
        job_of("--cases", str(names))


def test_an_unwritable_results_folder_is_named_before_training(dataset, monkeypatch, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("nnssl_results", str(blocked))
    with pytest.raises(NnsslError, match="cannot write"):
        loop.pretrain(job_of("--epochs", "1", "--iterations", "1"))


def test_the_same_seed_repeats_a_run_and_another_does_not(dataset, monkeypatch, tmp_path):
    runs = []
    for folder, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        monkeypatch.setenv("nnssl_results", str(tmp_path / folder))
        job = job_of("--epochs", "1", "--iterations", "2", "--seed", seed)
        assert loop.pretrain(job)
        runs.append(float(log_of(job)[0]["loss"]))
    assert runs[0] == runs[1] != runs[2]
