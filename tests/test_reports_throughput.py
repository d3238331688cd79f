"""The benchmark measures what it says."""

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nnssl_ext.cli import benchmark
from nnssl_ext.engine.job import Job
from nnssl_ext.engine.settings import RunSettings
from nnssl_ext.errors import NnsslError
from nnssl_ext.networks.build import build_backbone
from nnssl_ext.networks.presets import PRIMUS_PRESETS, RESENC_PRESETS
from nnssl_ext.networks.student_teacher import StudentTeacher
from nnssl_ext.reports import throughput
from nnssl_ext.reports.synthetic import CONFIGURATION, synthetic_job, synthetic_plans
from nnssl_ext.reports.throughput import Stopwatch, measure_data, measure_steps, measure_visible_against_all

CPU = torch.device("cpu")


def job_of(preset: str, folder: Path, crop=(16, 16, 16)) -> Job:
    return synthetic_job(preset, crop, "MAETrainer", RunSettings(batch_size=1), folder)


def test_stopwatch_tells_time_and_not_waiting_from_computing():
    watch = Stopwatch(CPU)
    for _ in range(2):
        with watch.phase("sleep"):
            time.sleep(0.05)
    found = watch.summary()["sleep"]
    assert found["min"] >= 0.05 and found["cpu_median"] < 0.04


@pytest.mark.parametrize("preset", ["PrimusTiny", "ResEncTiny"])
def test_every_phase_of_a_step_is_measured(preset, tmp_path):
    found = measure_steps(job_of(preset, tmp_path), repeats=1, warm_up=1)
    assert set(found["seconds"]) == {"read", "views", "forward", "backward", "optimizer", "step"}
    assert all(phase["min"] > 0 for phase in found["seconds"].values())
    assert found["settings"]["preset"] == preset and found["settings"]["crop"] == [16, 16, 16]
    assert found["cases_per_s"] == pytest.approx(
        1 / (found["seconds"]["read"]["median"] + found["seconds"]["step"]["median"])
    )
    assert 0.1 < found["peak_memory_gb"] < 20
    passes = found["seconds"]["forward"]["median"] + found["seconds"]["backward"]["median"]
    assert found["step_over_passes"]["wall"] == pytest.approx(found["seconds"]["step"]["median"] / passes, abs=1e-3)


def test_phases_do_what_a_training_step_does(tmp_path):
    """From the same weights and batch, the step cut into phases moves every weight as the real one."""
    weights = []
    for by_phase in (False, True):
        job = replace(job_of("ResEncTiny", tmp_path / str(by_phase)), output=tmp_path)
        parts = throughput.assemble(throughput.launch(job.run), job, throughput.build_method(job))
        batch = next(
            iter(
                throughput.make_loader(job.cases, parts.method.view_policy, seed=0, start_step=0, steps=1, batch_size=1)
            )
        )
        if by_phase:
            throughput._step_by_phase(parts, batch, Stopwatch(CPU))
        else:
            throughput.optimizer_step(parts, [batch], throughput.TrainState())
        weights.append({name: value.clone() for name, value in parts.method.state_dict().items()})
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, msg=name)


def test_data_is_measured_as_drawn_and_with_everything(tmp_path):
    found = measure_data(job_of("ResEncTiny", tmp_path).cases, (16, 16, 16), CPU, repeats=2)
    assert set(found["seconds_per_case"]) == {
        "read",
        "read_as_drawn",
        "views_as_drawn",
        "read_everything",
        "views_everything",
    }


def test_everything_means_every_augmentation_in_every_sample(tmp_path):
    (case, *_) = job_of("ResEncTiny", tmp_path).cases
    policy = throughput.SingleView((16, 16, 16), None, *throughput.EVERYTHING)
    for seed in range(5):
        (draw,) = policy.draw(case, np.random.default_rng(seed), 0.5)
        assert len(draw.intensity) == 8  # seven augmentations and the seed of the noise
        linear = draw.affine[:3, :3]
        assert np.linalg.det(linear) < 0 and not np.allclose(linear, np.diag(np.diag(linear)))


def test_the_comparison_encodes_a_quarter_and_all_of_the_tokens(tmp_path, monkeypatch):
    seen = []
    parts_of = throughput.assemble

    def watched(fabric, job, method):
        parts = parts_of(fabric, job, method)
        block = parts.method.backbone.network.eva.blocks[0]
        block.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[1]))
        return parts

    monkeypatch.setattr(throughput, "assemble", watched)
    found = measure_visible_against_all(job_of("PrimusTiny", tmp_path), repeats=1)
    tokens = (16 // PRIMUS_PRESETS["PrimusTiny"].token_size) ** 3
    assert set(seen[: len(seen) // 2]) == {tokens // 4} and set(seen[len(seen) // 2 :]) == {tokens}
    assert found["speed_up"] > 0


def test_convolutions_have_no_visible_tokens_to_compare(tmp_path):
    with pytest.raises(NnsslError, match="does not encode visible tokens only"):
        measure_visible_against_all(job_of("ResEncTiny", tmp_path), repeats=1)


@pytest.mark.parametrize("preset", ["PrimusTiny", "PrimusS", "ResEncTiny", "ResEncM"])
def test_synthetic_plans_build_the_presets(preset):
    backbone = build_backbone(synthetic_plans(preset, (32, 64, 64), 2), CONFIGURATION, 1)
    if preset in PRIMUS_PRESETS:
        assert backbone.embed_dim == PRIMUS_PRESETS[preset].embed_dim
        assert len(backbone.network.eva.blocks) == PRIMUS_PRESETS[preset].depth
    else:
        sizes = RESENC_PRESETS[preset]
        assert backbone.channels[0] == sizes.base_features and max(backbone.channels) <= sizes.max_features
        assert backbone.divisor == ((4, 4, 4) if preset == "ResEncTiny" else (8, 16, 16))


def run_cli(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["nnssl_benchmark", *arguments])
    with pytest.raises(SystemExit) as end:
        benchmark.main()
    return end.value.code


SMALL = ("throughput", "--crop", "16", "16", "16", "--repeats", "1")


def test_command_prints_json_alone_on_stdout(monkeypatch, capsys):
    code = run_cli(monkeypatch, *SMALL, "--synthetic", "PrimusTiny", "--batch_size", "1")
    printed = json.loads(capsys.readouterr().out)
    assert code == 0 and set(printed) == {"machine", "data", "training"}
    assert printed["machine"]["device"] == "cpu" and printed["machine"]["threads"] >= 1


def test_command_takes_the_settings_of_the_method(monkeypatch, capsys):
    flags = ("--synthetic", "PrimusTiny", "-tr", "DINO3DTrainer", "--crops.local_views", "1", "--head.prototypes", "32")
    seen = []
    forward = StudentTeacher.passes
    monkeypatch.setattr(StudentTeacher, "passes", lambda self, views: seen.append(len(views)) or forward(self, views))
    assert run_cli(monkeypatch, *SMALL, *flags) == 0
    assert set(seen) == {3}
    assert json.loads(capsys.readouterr().out)["training"]["settings"]["method"] == "DINO3DTrainer"
    assert run_cli(monkeypatch, *SMALL, "--synthetic", "PrimusTiny", "--crops.local_views", "1") == 2


def test_command_writes_a_file(monkeypatch, tmp_path, capsys):
    target = tmp_path / "result.json"
    assert run_cli(monkeypatch, *SMALL, "--synthetic", "ResEncTiny", "--data_only", "-o", str(target)) == 0
    assert set(json.loads(target.read_text())) == {"machine", "data"} and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("throughput", "name DATASET and CONFIGURATION"),
        ("throughput --synthetic PrimusTiny", "--synthetic needs --crop"),
        ("throughput --synthetic PrimusTinny --crop 16 16 16", "did you mean 'PrimusTiny'"),
        ("throughput --synthetic PrimusTiny --crop 16 16 16 --repeats 0", "measure at least once"),
    ],
)
def test_command_refuses_with_the_remedy(monkeypatch, capsys, arguments, message):
    assert run_cli(monkeypatch, *arguments.split()) == 2
    assert message in capsys.readouterr().err


def test_methods_that_compare_voxels_say_what_finding_them_takes(tmp_path):
    job = synthetic_job("ResEncTiny", (16, 16, 16), "Vox2VecTrainer", RunSettings(batch_size=1), tmp_path)
    seconds = measure_steps(job, repeats=1, warm_up=1)["seconds"]
    assert 0 < seconds["match"]["cpu_min"] < seconds["forward"]["cpu_min"]  # of which it is a part
