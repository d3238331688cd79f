"""``nnssl_probe`` as users run it: a table, a page, JSON, and named failures; on real scans in a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from checkpoint_helpers import content_of, nnssl_checkpoint, resenc
from tiny_dataset import DATASET, plans_of, write_dataset

from nnssl_ext.checkpoints.io import save_checkpoint
from nnssl_ext.cli import probe
from nnssl_ext.errors import NnsslError
from nnssl_ext.files import read_json, write_json
from nnssl_ext.networks.build import build_network

QUICK = [
    *("--train", "3", "--test", "3", "-device", "cpu", "--voxels", "300", "--neighbours_of", "200"),
    *("--iterations", "10", "--batch_size", "64", "--width", "8", "--controls", "1"),
]


@pytest.fixture
def dataset(nnunet_env):
    return write_dataset(nnunet_env.preprocessed)


@pytest.fixture
def checkpoint(dataset, nnunet_env):
    """A run that saw one of the cases."""
    run = nnunet_env.pretraining / "run"
    run.mkdir()
    save_checkpoint(run / "last.pth", content_of(plans_of("ResEncTiny"), data_summary={"dataset": DATASET, "cases": 1}))
    write_json(run / "settings.json", {"dataset": DATASET, "cases": ["case_01"]})
    return run / "last.pth"


def call(monkeypatch, *flags) -> int:
    monkeypatch.setattr(sys, "argv", ["nnssl_probe", *map(str, flags)])
    return probe._main()


def test_importing_it_loads_no_torch():
    code = "import sys, nnssl_ext.cli.probe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_table_page_and_json_say_the_same(checkpoint, monkeypatch, capsys):
    splits = [{"train": ["case_00", "case_02", "case_04"], "val": ["case_01", "case_03", "case_05"]}]
    write_json(checkpoint.parents[2] / "nnUNet_preprocessed" / DATASET / "splits_final.json", splits)
    assert call(monkeypatch, checkpoint, "-d", 901, *QUICK) == 0
    folder = checkpoint.parent / f"probe_last_{DATASET}"
    content = read_json(folder / "probe.json")
    assert "NaN" not in (folder / "probe.json").read_text()
    assert content["train"] == splits[0]["train"] and content["test"] == splits[0]["val"]
    assert [(row["features"], row["head"]) for row in content["rows"]] == [
        (features, head)
        for features in ("pretrained", "random weights", "intensity")
        for head in ("linear", "non-linear", "kNN")
    ]
    assert content["features"]["pretrained"]["channels"] == content["features"]["random weights"]["channels"] == 28
    intensity = next(row for row in content["rows"] if row["features"] == "intensity")
    assert intensity["dice"]["bright"]["mean"] > 0.9  # the label is a threshold of the image
    cases = [each["dice"]["bright"] for each in intensity["cases"].values()]
    assert intensity["dice"]["bright"]["mean"] == pytest.approx(sum(cases) / 3)
    pretrained, untrained = (content["rows"][place]["dice"]["bright"]["mean"] for place in (0, 3))
    (difference,) = (
        each["difference"]
        for each in content["comparisons"]
        if (each["head"], each["second"], each["figure"], each["class"])
        == ("linear", "random weights", "dice", "bright")
    )
    assert difference == pytest.approx(pretrained - untrained)
    assert all(each["shown"] == 0 for each in content["comparisons"])  # three cases show nothing
    (leak,) = content["leaks"]
    assert leak.startswith("1 of 3 scored cases") and leak.endswith("case_01")
    printed, page = capsys.readouterr().out, (folder / "probe.html").read_text()
    for text in (content["verdicts"][0].split(" (")[0], leak, f"{pretrained:.3f}"):
        assert text in printed and text in page
    assert page.count("data:image/png") == 2 and 'src="http' not in page


def test_the_same_seed_gives_the_same_figures(checkpoint, monkeypatch, tmp_path):
    found = []
    for name in ("a", "b"):
        assert call(monkeypatch, checkpoint, "-d", 901, "-o", tmp_path / name, *QUICK) == 0
        content = read_json(tmp_path / name / "probe.json")
        found.append((content["test"], content["rows"], content["checkpoint"]["weights_and_buffers_sha256"]))
    assert found[0] == found[1]


def test_a_checkpoint_of_nnssl(dataset, monkeypatch, tmp_path):
    kwargs = resenc()["arch_kwargs"]
    plans = plans_of("ResEncTiny")
    plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"] = kwargs
    network = build_network(plans, "3d_fullres", 1, 1)
    save_checkpoint(tmp_path / "openmind.pth", nnssl_checkpoint("ResidualEncoderUNet", network, [16, 16, 16], kwargs))
    with pytest.raises(NnsslError, match="was not trained with plans of Dataset901_Tiny"):
        call(monkeypatch, tmp_path / "openmind.pth", "-d", 901, *QUICK)
    flags = ("-p", "nnsslPrimusTinyPlans", "-o", tmp_path / "out")  # another network's plans: the cases are what counts
    assert call(monkeypatch, tmp_path / "openmind.pth", "-d", 901, *flags, *QUICK) == 0
    content = read_json(tmp_path / "out" / "probe.json")
    assert content["checkpoint"]["kind"] == "nnssl" and content["features"]["pretrained"]["channels"] == 24
    assert "does not list the images" in content["leaks"][0]


def test_bad_input_is_named(dataset, checkpoint, monkeypatch):
    listing = read_json(dataset / "dataset.json")
    for labels in ({"background": 0}, {"background": 0, "foreground": 1}):
        write_json(dataset / "dataset.json", {**listing, "labels": labels})
        with pytest.raises(NnsslError, match="Dataset901_Tiny has no labels to tell apart"):
            call(monkeypatch, checkpoint, "-d", 901, *QUICK)
    write_json(dataset / "dataset.json", listing)
    with pytest.raises(NnsslError, match="no checkpoint at"):
        call(monkeypatch, checkpoint.parent / "no.pth", "-d", 901, *QUICK)
    for flags, words in (
        (["--train", "5", "--test", "3"], "5 case.* to teach and 3 to score, of 6 cases"),
        (["-p", "nnsslPrimusTinyPlan"], "did you mean 'nnsslPrimusTinyPlans'"),
        (["-c", "3d_lowres"], "3d_lowres"),
        (["--fold", "0"], "splits_final.json"),
        (["--pyramid", "decoder", "--iterations", "0"], "--iterations 0"),
    ):
        with pytest.raises(NnsslError, match=words):
            call(monkeypatch, checkpoint, "-d", 901, *QUICK, *flags)
    plans = plans_of("PrimusTiny")
    plans["configurations"]["3d_fullres"]["normalization_schemes"] = ["CTNormalization"]
    write_json(dataset / "nnsslPrimusTinyPlans.json", plans)
    with pytest.raises(NnsslError, match=r"do not match last\.pth: they normalise with CTNormalization"):
        call(monkeypatch, checkpoint, "-d", 901, "-p", "nnsslPrimusTinyPlans", *QUICK)
    content = content_of(plans_of("ResEncTiny"))
    content["network_weights"] = {k: v for k, v in content["network_weights"].items() if "encoder" not in k}
    save_checkpoint(checkpoint.parent / "bare.pth", content)
    with pytest.raises(NnsslError, match=r"bare\.pth lacks \d+ weights of the encoder"):
        call(monkeypatch, checkpoint.parent / "bare.pth", "-d", 901, *QUICK)


def test_real_hippocampus_in_a_fresh_process(nnunet_env, test_data):
    """Convert, plan, pretrain two steps: the latest checkpoint, as a run that still trains has it."""
    nnunet_env.run("nnssl_convert", "msd", test_data / "Task04_Hippocampus", "-d", 4, "--limit", 8, "-np", 1)
    nnunet_env.run(
        "nnUNetv2_plan_and_preprocess", "-d", 4, "-pl", "nnsslPlannerResEncTiny", "-c", "3d_fullres", "-np", 1
    )
    flags = ("-tr", "MAETrainer", "-p", "nnsslResEncTinyPlans", "--epochs", 1, "--iterations", 2, "--batch_size", 2)
    nnunet_env.run("nnssl_train", 4, "3d_fullres", *flags, "--probe_epochs", 0, "-device", "cpu")
    (run,) = (nnunet_env.pretraining / "Dataset004_Hippocampus").iterdir()
    (run / "checkpoint_final.pth").unlink()
    told = nnunet_env.run("nnssl_probe", run / "checkpoint_latest.pth", "-d", 4, *QUICK)
    content = json.loads((run / "probe_checkpoint_latest_Dataset004_Hippocampus" / "probe.json").read_text())
    assert list(content["classes"].values()) == [1, 2]
    assert len(content["leaks"]) == 1 and content["leaks"][0].startswith("3 of 3 scored cases")
    assert all(row["dice"]["foreground mean"]["n"] == 3 for row in content["rows"])
    assert content["verdicts"][0] in told.stdout and "pretrained: features of cases that teach" in told.stderr
