"""``nnssl_benchmark registration`` as users run it: a table, resumed after kills, with controls and named failures."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import numpy as np
import pytest
from checkpoint_helpers import content_of, plans_of, primus
from scans import write
from scipy.ndimage import gaussian_filter

from nnssl_ext.checkpoints.io import save_checkpoint
from nnssl_ext.cli import benchmark
from nnssl_ext.errors import NnsslError
from nnssl_ext.files import read_json, write_json
from nnssl_ext.registration.benchmark import matrix

CASES = 6
QUICK = ["--solver.iterations", "3", "-device", "cpu", "--development", "3", "--test", "3", "--controls", "1"]
TIMES = {"cpu_seconds", "seconds", "peak_memory_gib", "load_average"}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Bright blobs that lie elsewhere in every case, and a checkpoint of a run that saw one of the cases."""
    folder = tmp_path_factory.mktemp("raw") / "Dataset777_Blobs"
    write_json(folder / "dataset.json", {"file_ending": ".nii.gz", "labels": {"background": 0, "blob": 1}})
    for number in range(CASES):
        rng = np.random.default_rng(number)
        z, y, x = np.ogrid[:16, :18, :20]
        centre = np.array([8, 9, 10]) + rng.uniform(-1.5, 1.5, 3)
        blob = (z - centre[0]) ** 2 + (y - centre[1]) ** 2 + (x - centre[2]) ** 2 < 16
        image = gaussian_filter(blob * 1.0, 1) + 0.05 * gaussian_filter(rng.normal(size=blob.shape), 1)
        grid = {"spacing": (1.0, 1.0, 1.0), "angle": 0.0}
        write(folder / "imagesTr" / f"blob_{number}_0000.nii.gz", (1000 * image).astype(np.float32), **grid)
        write(folder / "labelsTr" / f"blob_{number}.nii.gz", blob.astype(np.uint8), **grid)
    run = folder.parent / "run"
    run.mkdir()
    save_checkpoint(run / "last.pth", content_of(plans_of(primus([16, 16, 16]), [16, 16, 16])))
    write_json(run / "settings.json", {"dataset": "Dataset777_Blobs", "cases": ["blob_4", "blob_0"]})
    return folder


def call(monkeypatch, dataset, out, *flags) -> int:
    argv = ["nnssl_benchmark", "registration", "-d", dataset, "-o", out, *QUICK, *flags]
    monkeypatch.setattr(sys, "argv", [str(part) for part in argv])
    return benchmark._main()


def without_times(content):
    if isinstance(content, dict):
        return {name: without_times(value) for name, value in content.items() if name not in TIMES}
    return [without_times(each) for each in content] if isinstance(content, list) else content


def test_importing_it_loads_neither_torch_nor_itk():
    code = "import sys, nnssl_ext.cli.benchmark; sys.exit(bool({'torch', 'SimpleITK'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_table_controls_choice_and_leaks(dataset, tmp_path, monkeypatch, capsys):
    net = f"net={dataset.parent / 'run' / 'last.pth'}"
    flags = ["--last", "-m", "none", "intensity", net, "--vary", "solver.fine_mm=2,4", "--against", "intensity"]
    assert call(monkeypatch, dataset, tmp_path, *flags) == 0
    content = read_json(tmp_path / "report.json")
    rows = {each["name"]: each for each in content["methods"]}
    assert list(rows) == ["none", "intensity", "net", "random weights of net"]
    assert rows["net"]["control"] == "random weights of net"
    assert rows["none"]["strength"] is None and rows["none"]["test"]["sdlogj"]["mean"] == 0
    assert rows["intensity"]["test"]["dice"]["mean"] > rows["none"]["test"]["dice"]["mean"]
    assert set(rows["intensity"]["development"]) == {"solver.fine_mm=2", "solver.fine_mm=4"}
    assert rows["intensity"]["settings"]["solver"]["fine_mm"] in (2, 4)
    assert set(rows["none"]["test_pairs"]) == {"blob_4_to_blob_3", "blob_5_to_blob_4"}
    against = {(each["first"], each["second"]) for each in content["comparisons"]}
    assert against == {
        ("none", "intensity"),
        ("net", "intensity"),
        ("net", "random weights of net"),
        ("random weights of net", "intensity"),
    }
    assert all(each["shown"] == 0 for each in content["comparisons"])  # two pairs show nothing
    (verdict,) = content["verdicts"]
    assert verdict.startswith("net: it is not shown that training helps")
    (warning,) = content["warnings"]
    assert "1 of 3 test cases" in warning and warning.endswith("blob_4")
    page = (tmp_path / "report.html").read_text()
    assert verdict.split(" (")[0] in page and "data:image/png" in page and 'src="http' not in page
    printed = capsys.readouterr().out
    assert "intensity: dice 0." in printed and "report.html" in printed


def test_killed_at_random_it_ends_with_the_same_table(dataset, tmp_path, monkeypatch):
    flags = ["-m", "none", "intensity", "--seed", "1"]
    assert call(monkeypatch, dataset, tmp_path / "whole", *flags) == 0
    rng, work = random.Random(8), matrix.run_cell

    def killed(*args):
        if rng.random() < 0.4:
            raise KeyboardInterrupt
        found = work(*args)
        if rng.random() < 0.2:
            raise KeyboardInterrupt  # after the file was written
        return found

    monkeypatch.setattr(matrix, "run_cell", killed)
    kills = 0
    while True:
        try:
            assert call(monkeypatch, dataset, tmp_path / "killed", *flags) == 0
            break
        except KeyboardInterrupt:
            kills += 1
    assert kills >= 5
    found = [without_times(read_json(tmp_path / name / "report.json")) for name in ("whole", "killed")]
    assert found[0] == found[1]
    monkeypatch.setattr(matrix, "run_cell", lambda *args: pytest.fail("everything was there"))
    assert call(monkeypatch, dataset, tmp_path / "killed", *flags) == 0


def test_dry_run_times_one_pair_and_keeps_it(dataset, tmp_path, monkeypatch, capsys):
    flags = ["-m", "none", "intensity", "--dry-run"]
    assert call(monkeypatch, dataset, tmp_path, *flags) == 0
    said = capsys.readouterr().out
    assert "none: 1 cells open" in said and "intensity: 3 cells open" in said and " h on this machine" in said
    assert len(list(tmp_path.rglob("*.json"))) == 2 and not (tmp_path / "report.json").exists()
    assert call(monkeypatch, dataset, tmp_path, *flags[:-1]) == 0
    assert call(monkeypatch, dataset, tmp_path, *flags) == 0
    assert "about 0.00 h" in capsys.readouterr().out


def test_a_pair_that_fails_is_named_and_the_others_go_on(dataset, tmp_path, monkeypatch, capsys):
    import shutil

    broken = tmp_path / dataset.name
    shutil.copytree(dataset, broken)
    (broken / "imagesTr" / "blob_5_0000.nii.gz").write_text("no image")
    assert call(monkeypatch, broken, tmp_path / "out", "--last", "-m", "none", "intensity") == 2
    content = read_json(tmp_path / "out" / "report.json")
    assert len(content["failures"]) == 2
    assert all("blob_5" in name and "blob_5_0000.nii.gz" in why for name, why in content["failures"].items())
    assert [list(each["test_pairs"]) for each in content["methods"]] == [["blob_4_to_blob_3"]] * 2
    assert "FAILED" in capsys.readouterr().out


def test_what_changes_the_figures_is_computed_again(dataset, tmp_path, monkeypatch):
    assert call(monkeypatch, dataset, tmp_path, "-m", "intensity") == 0
    first = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("cells/**/*.json")}
    assert call(monkeypatch, dataset, tmp_path, "-m", "intensity", "--sdlogj", "0.1") == 0
    changed = {path.parent.parent.name for path, then in first.items() if path.stat().st_mtime_ns != then}
    assert changed == {"test"}  # another strength there, the same curves on development pairs


def test_labels_that_changed_are_scored_again(dataset, tmp_path, monkeypatch):
    """Corrected, or told to be ignored; without touching the other pairs."""
    import shutil

    import SimpleITK as sitk

    changing, out = tmp_path / dataset.name, tmp_path / "out"
    shutil.copytree(dataset, changing)

    def touched() -> set[str]:
        before = {path: path.stat().st_mtime_ns for path in out.rglob("cells/**/*.json")}
        assert call(monkeypatch, changing, out, "--last", "-m", "none") == 0
        return {path.name for path in out.rglob("cells/**/*.json") if path.stat().st_mtime_ns != before.get(path)}

    assert len(touched()) == 2 and not touched()
    label = sitk.ReadImage(str(changing / "labelsTr" / "blob_5.nii.gz"))
    label[:, :, :8] = 2 * label[:, :, :8]
    sitk.WriteImage(label, str(changing / "labelsTr" / "blob_5.nii.gz"))
    assert touched() == {"blob_5_to_blob_4_seed0.json"}
    write_json(
        changing / "dataset.json", {"file_ending": ".nii.gz", "labels": {"background": 0, "blob": 1, "ignore": 2}}
    )
    assert len(touched()) == 2
    for each in read_json(out / "report.json")["methods"][0]["test_pairs"].values():
        assert "dice_1" in each and "dice_2" not in each


def test_a_file_for_a_folder_is_named_before_any_work(dataset, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(NnsslError, match="file is a file"):
        call(monkeypatch, dataset, tmp_path / "file", "-m", "no.pth")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["-m", "mnd"], "no feature 'mnd'"),
        (["-m", "mind", "--against", "demons"], "--against demons"),
        (["-m", "mind", "--vary", "features.zoom"], "--vary features.zoom"),
        (["-m", "mind", "--sdlogj", "0"], "--sdlogj 0"),
        (["-m", "mind", "--test", "9"], "9 test cases of 6"),
    ],
)
def test_bad_requests_are_named_before_any_work(dataset, tmp_path, monkeypatch, flags, words):
    with pytest.raises(NnsslError, match=words):
        call(monkeypatch, dataset, tmp_path, *flags)
    assert not list(tmp_path.iterdir())


def test_the_report_is_plain_json(dataset, tmp_path, monkeypatch):
    assert call(monkeypatch, dataset, tmp_path, "-m", "none") == 0
    json.loads((tmp_path / "report.json").read_text(), parse_constant=lambda name: pytest.fail(name))
