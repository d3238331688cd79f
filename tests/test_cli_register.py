"""``nnssl_register`` as users run it: one pair, and a batch that nothing ends."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import SimpleITK as sitk
from checkpoint_helpers import content_of, plans_of, primus
from scans import write
from scipy.ndimage import gaussian_filter

from nnssl_ext.checkpoints.io import save_checkpoint
from nnssl_ext.cli import register
from nnssl_ext.errors import NnsslError
from nnssl_ext.files import read_json, sha256_of
from nnssl_ext.registration.batch import read_pairs, sums_of
from nnssl_ext.registration.outputs import MEASURES

FILES = {"warped.nii.gz", "displacement.nii.gz", "transform.h5", "measures.json", "overview.png"}
QUICK = ["--solver.iterations", "5", "-device", "cpu"]


def scan(path, seed=0, **grid):
    texture = gaussian_filter(np.random.default_rng(seed).normal(size=(16, 18, 20)), 1.5)
    return write(path, (1000 * texture).astype(np.float32), **grid)


def call(monkeypatch, *flags) -> int:
    monkeypatch.setattr(sys, "argv", ["nnssl_register", *map(str, flags)])
    return register._main()


def test_importing_it_loads_neither_torch_nor_itk():
    code = "import sys, nnssl_ext.cli.register; sys.exit(bool({'torch', 'SimpleITK'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_one_pair(tmp_path, monkeypatch, capsys):
    fixed, moving = scan(tmp_path / "f.nii.gz"), scan(tmp_path / "m.nii.gz", 1)
    out = tmp_path / "out"
    assert (
        call(monkeypatch, "-f", fixed, "-m", moving, "-c", "mind+intensity", "-o", out, "--weights", 2, 1, *QUICK) == 0
    )
    assert {path.name for path in out.iterdir()} == FILES
    assert "displacement: mean" in capsys.readouterr().out
    assert [each["name"] for each in read_json(out / MEASURES)["features"]] == ["mind", "intensity"]


def test_labels_masks_and_the_inverse(tmp_path, monkeypatch, capsys):
    fixed, moving = scan(tmp_path / "f.nii.gz"), scan(tmp_path / "m.nii.gz")
    label = np.zeros((16, 18, 20), np.uint8)
    label[4:10, 5:12, 6:14] = 1
    mask = write(tmp_path / "mask.nii.gz", label)
    flags = ["-f", fixed, "-m", moving, "-c", "mind", "-o", tmp_path / "out", "--inverse", *QUICK]
    roles = ("fixed-mask", "moving-mask", "fixed-labels", "moving-labels")
    assert call(monkeypatch, *flags, *(part for role in roles for part in (f"--{role}", mask))) == 0
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found == FILES | {"warped_labels.nii.gz", "displacement_inverse.nii.gz"}
    assert read_json(tmp_path / "out" / MEASURES)["labels_before"]["dice"]["mean"] == 1.0
    assert "Dice: 1.000 before" in capsys.readouterr().out


def test_a_batch_survives_bad_pairs_and_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    scan(tmp_path / "a.nii.gz"), scan(tmp_path / "b.nii.gz", 1)
    scan(tmp_path / "far.nii.gz", origin=(900.0, 0.0, 0.0))
    write(tmp_path / "constant.nii.gz", np.zeros((16, 18, 20), np.float32))
    write(tmp_path / "small.nii.gz", np.ones((8, 8, 8), np.uint8))
    (tmp_path / "text.nii.gz").write_text("no image")
    write(tmp_path / "slice.nii.gz", np.ones((1, 18, 20), np.float32) * np.arange(20, dtype=np.float32))
    sitk.WriteImage(sitk.ReadImage(str(tmp_path / "slice.nii.gz"))[:, :, 0], str(tmp_path / "flat.nii.gz"))
    hole = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "a.nii.gz")))
    hole[3, 3, 3] = np.nan
    write(tmp_path / "hole.nii.gz", hole)
    write(tmp_path / "empty.nii.gz", np.zeros((16, 18, 20), np.uint8))
    rows = [
        "name,fixed,moving,fixed_mask,init",
        "good,a.nii.gz,b.nii.gz,,",
        "constant,a.nii.gz,constant.nii.gz,,",
        "apart,a.nii.gz,far.nii.gz,,none",
        "mask,a.nii.gz,b.nii.gz,small.nii.gz,",
        "text,text.nii.gz,b.nii.gz,,",
        "flat,a.nii.gz,flat.nii.gz,,",
        "hole,a.nii.gz,hole.nii.gz,,",
        "empty,a.nii.gz,b.nii.gz,empty.nii.gz,",
        "missing,a.nii.gz,c.nii.gz,,",
        ",b.nii.gz,a.nii.gz,,",
    ]
    (tmp_path / "pairs.csv").write_text("\n".join(rows))
    out = tmp_path / "out"
    flags = ["--pairs", tmp_path / "pairs.csv", "-c", "mind", "-o", out, *QUICK]
    assert call(monkeypatch, *flags) == 2
    assert {path.parent.name for path in out.glob(f"*/{MEASURES}")} == {"good", "a_to_b"}
    failures = read_json(out / "failures.json")
    words = {
        "constant": "constant image",
        "apart": "do not meet",
        "mask": "shape",
        "text": "text.nii.gz",
        "flat": "2D",
        "hole": "NaN",
        "empty": "no foreground",
        "missing": "c.nii.gz",
    }
    assert failures.keys() == words.keys()
    assert [name for name in words if words[name] not in failures[name]] == []
    capsys.readouterr()
    scan(tmp_path / "c.nii.gz", 2)  # what was missing comes
    written = (out / "good" / MEASURES).stat().st_mtime_ns
    assert call(monkeypatch, *flags) == 2
    assert "good: done before" in capsys.readouterr().out
    assert (out / "good" / MEASURES).stat().st_mtime_ns == written
    assert "missing" not in read_json(out / "failures.json")
    assert call(monkeypatch, *flags[:-4], "--solver.iterations", "4", "-device", "cpu") == 2  # other settings: again
    assert (out / "good" / MEASURES).stat().st_mtime_ns != written


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("fixed,moved\na,b", "columns fixed, moved"),
        ("fixed,moving\na,", "line 2"),
        ("fixed,moving\n", "lists no pairs"),
        ("name,fixed,moving\np,a,b\np,c,d", "no new folder name"),
        ("name,fixed,moving\n../p,a,b", "no new folder name"),
        ("name,fixed,moving\n..,a,b", "line 2: '..' is no new folder name"),
        ("name,fixed,moving\na\\b,a,b", "no new folder name"),
        ("name,fixed,moving\nfailures.json,a,b", "line 2: 'failures.json' is no new folder name"),
        ("fixed,moving,fixed\na,b,c", "more than one column fixed"),
        ('name,fixed,moving\n\n,,\n"p\nq",a,b\nr,a,', "line 6: no fixed or no moving"),
    ],
)
def test_bad_lists_are_named(tmp_path, content, words):
    (tmp_path / "pairs.csv").write_text(content)
    with pytest.raises(NnsslError, match=words):
        read_pairs(tmp_path / "pairs.csv")


@pytest.mark.parametrize("flag", ["-f", "--moving-mask", "--fixed-labels"])
def test_what_a_list_would_hide_is_refused(monkeypatch, capsys, flag):
    with pytest.raises(SystemExit) as end:
        call(monkeypatch, "--pairs", "pairs.csv", "-c", "mind", "-o", "out", flag, "a.nii.gz")
    assert end.value.code == 2 and "columns of the CSV" in capsys.readouterr().err


def test_transforms_of_a_list_lie_beside_it(tmp_path, monkeypatch):
    scan(tmp_path / "lists" / "a.nii.gz"), scan(tmp_path / "lists" / "b.nii.gz", 1)
    sitk.WriteTransform(sitk.TranslationTransform(3, (1.0, 0.0, 0.0)), str(tmp_path / "lists" / "shift.tfm"))
    rows = ["name,fixed,moving,init", "given,a.nii.gz,b.nii.gz,shift.tfm", "found,a.nii.gz,b.nii.gz,centre"]
    listing = tmp_path / "lists" / "pairs.csv"
    listing.write_text("\n".join(rows))
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, "--pairs", "lists/pairs.csv", "-c", "mind", "-o", "out", *QUICK) == 0
    assert read_json(tmp_path / "out" / "given" / MEASURES)["start"] == "read from shift.tfm"
    assert "centres" in read_json(tmp_path / "out" / "found" / MEASURES)["start"]


def test_a_network_that_changed_is_asked_again(tmp_path, monkeypatch, capsys):
    scan(tmp_path / "a.nii.gz"), scan(tmp_path / "b.nii.gz", 1)
    (tmp_path / "pairs.csv").write_text("name,fixed,moving\np,a.nii.gz,b.nii.gz")
    plans = plans_of(primus([16, 16, 16]), [16, 16, 16])
    flags = ["--pairs", tmp_path / "pairs.csv", "-c", f"{tmp_path}/last.pth+mind", "-o", tmp_path / "out", *QUICK]
    said = []
    for seed in (0, None, 1):
        if seed is not None:
            save_checkpoint(tmp_path / "last.pth", content_of(plans, seed=seed))
        assert call(monkeypatch, *flags) == 0
        said.append("done before" in capsys.readouterr().out)
    assert said == [False, True, False]
    request = read_json(tmp_path / "out" / "p" / MEASURES)["request"]
    assert request["files"] == {str(tmp_path / "last.pth"): sha256_of(tmp_path / "last.pth")}
    monkeypatch.setattr(register, "version", lambda _: "another")
    assert call(monkeypatch, *flags) == 0
    assert "done before" not in capsys.readouterr().out


def test_lines_without_any_value_are_skipped(tmp_path):
    (tmp_path / "pairs.csv").write_text("name,fixed,moving\n,,\np,a,b\n , ,\n")
    assert list(read_pairs(tmp_path / "pairs.csv")) == ["p"]


def test_files_that_changed_are_registered_again(tmp_path, monkeypatch, capsys):
    """Under the same names: scan, mask, labels and start, corrected or of another working folder."""
    out, rows = (
        tmp_path / "out",
        ["name,fixed,moving,fixed_mask,moving_labels,init", "p,f.nrrd,m.nrrd,k.nrrd,l.nrrd,s.tfm"],
    )
    label = np.ones((16, 18, 20), np.uint8)

    def write_all(folder):
        scan(folder / "f.nrrd"), scan(folder / "m.nrrd", 1)
        write(folder / "k.nrrd", label), write(folder / "l.nrrd", label)
        sitk.WriteTransform(sitk.TranslationTransform(3, (1.0, 0.0, 0.0)), str(folder / "s.tfm"))
        (folder / "pairs.csv").write_text("\n".join(rows))

    def done_before(folder) -> bool:
        monkeypatch.chdir(folder)
        assert call(monkeypatch, "--pairs", "pairs.csv", "-c", "mind", "-o", out, *QUICK) == 0
        return "done before" in capsys.readouterr().out

    first, second = tmp_path / "first", tmp_path / "second"
    write_all(first), write_all(second)
    scan(second / "m.nrrd", 2)
    assert [done_before(folder) for folder in (first, first, second, second)] == [False, True, False, True]
    smaller = label.copy()
    smaller[:, :, :4] = 0
    for change in (
        lambda: write(second / "k.nrrd", smaller),
        lambda: write(second / "l.nrrd", smaller),
        lambda: sitk.WriteTransform(sitk.TranslationTransform(3, (2.0, 0.0, 0.0)), str(second / "s.tfm")),
    ):
        change()
        assert [done_before(second), done_before(second)] == [False, True]


def test_a_result_that_lacks_a_file_is_made_again(tmp_path, monkeypatch, capsys):
    scan(tmp_path / "f.nrrd"), scan(tmp_path / "m.nrrd", 1)
    (tmp_path / "pairs.csv").write_text("name,fixed,moving\np,f.nrrd,m.nrrd\n")
    flags = ("--pairs", tmp_path / "pairs.csv", "-c", "mind", "-o", tmp_path / "out", *QUICK)
    said = []
    for lost in ("", "", "warped.nii.gz", "transform.h5"):
        if lost:
            (tmp_path / "out" / "p" / lost).unlink()
        assert call(monkeypatch, *flags) == 0
        said.append("done before" in capsys.readouterr().out)
    assert said == [False, True, False, False] and (tmp_path / "out" / "p" / "warped.nii.gz").is_file()


@pytest.mark.parametrize("ending", ["mhd", "nhdr"])
def test_voxels_that_changed_beside_their_header_are_noticed(tmp_path, ending):
    file = tmp_path / f"scan[1].{ending}"
    sums = []
    for value in (1, 1, 2):
        write(file, np.full((4, 5, 6), value, np.uint8))
        sums.append((file.read_bytes(), sums_of({"fixed": file})["fixed"]))
    assert sums[0] == sums[1]
    assert sums[1][0] == sums[2][0] and sums[1][1] != sums[2][1]


def test_a_start_for_all_that_changed_is_another_one(tmp_path, monkeypatch, capsys):
    scan(tmp_path / "a.nii.gz"), scan(tmp_path / "b.nii.gz", 1)
    (tmp_path / "pairs.csv").write_text("fixed,moving\na.nii.gz,b.nii.gz")
    flags = ["--pairs", tmp_path / "pairs.csv", "-c", "mind", "-o", tmp_path / "out", "--init", tmp_path / "s.tfm"]
    for shift in (1.0, 2.0):
        sitk.WriteTransform(sitk.TranslationTransform(3, (shift, 0.0, 0.0)), str(tmp_path / "s.tfm"))
        assert call(monkeypatch, *flags, *QUICK) == 0
        assert "done before" not in capsys.readouterr().out


def test_inputs_are_not_replaced_by_results(tmp_path, monkeypatch):
    out = tmp_path / "out"
    fixed, moving = scan(out / "f.nii.gz"), scan(out / "warped.nii.gz", 1)
    before = sha256_of(moving)
    (tmp_path / "link").symlink_to(out)
    monkeypatch.setattr("nnssl_ext.registration.features.load_features", lambda *_: pytest.fail("too late"))
    flags = ["-f", fixed, "-m", moving, "-c", "mind", *QUICK]
    for folder in (out, tmp_path / "link"):
        with pytest.raises(NnsslError, match=r"warped\.nii\.gz would be replaced") as told:
            call(monkeypatch, *flags, "-o", folder)
        assert "another -o" in told.value.fix and sha256_of(moving) == before


def test_only_results_of_ours_are_replaced(tmp_path, monkeypatch):
    fixed, moving, out = scan(tmp_path / "f.nii.gz"), scan(tmp_path / "m.nii.gz", 1), tmp_path / "out"
    flags = ["-f", fixed, "-m", moving, "-c", "mind", "-o", out, *QUICK]
    out.mkdir()
    for name, content in (("overview.png", "mine"), (MEASURES, '{"heart rate": 70}'), (MEASURES, "[]")):
        (out / name).write_text(content)
        with pytest.raises(NnsslError, match=f"{name} is not known to come from a registration"):
            call(monkeypatch, *flags)
        assert (out / name).read_text() == content
        (out / name).unlink()
    assert call(monkeypatch, *flags) == 0 and call(monkeypatch, *flags) == 0


def test_what_a_killed_run_leaves_is_replaced(tmp_path, monkeypatch):
    fixed, moving, out = scan(tmp_path / "f.nii.gz"), scan(tmp_path / "m.nii.gz", 1), tmp_path / "out"
    flags = ["-f", fixed, "-m", moving, "-c", "mind", "-o", out, *QUICK]

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("nnssl_ext.registration.outputs.measure", killed)
        call(patched, *flags)
    assert (out / "warped.nii.gz").exists() and not (out / MEASURES).exists()
    assert call(monkeypatch, *flags) == 0
    assert {path.name for path in out.iterdir()} == FILES


def test_measures_that_are_none_do_not_end_the_batch(tmp_path, monkeypatch):
    scan(tmp_path / "a.nii.gz"), scan(tmp_path / "b.nii.gz", 1)
    (tmp_path / "pairs.csv").write_text("name,fixed,moving\np,a.nii.gz,b.nii.gz\nq,b.nii.gz,a.nii.gz")
    (tmp_path / "out" / "p").mkdir(parents=True)
    (tmp_path / "out" / "p" / MEASURES).write_text("[]")
    assert call(monkeypatch, "--pairs", tmp_path / "pairs.csv", "-c", "mind", "-o", tmp_path / "out", *QUICK) == 2
    failures = read_json(tmp_path / "out" / "failures.json")
    assert list(failures) == ["p"] and MEASURES in failures["p"] and (tmp_path / "out" / "q" / MEASURES).exists()


@pytest.mark.parametrize("below", ["", "pair"])
def test_a_file_for_a_folder_is_named_before_any_work(tmp_path, monkeypatch, below):
    (tmp_path / "file").write_text("")
    (tmp_path / "pairs.csv").write_text("fixed,moving\na,b")
    for given in (["-f", "a", "-m", "b"], ["--pairs", tmp_path / "pairs.csv"]):
        with pytest.raises(NnsslError, match="file is a file"):
            call(monkeypatch, *given, "-c", "no.pth", "-o", tmp_path / "file" / below, *QUICK)


def test_a_start_without_inverse_is_refused_before_any_work(tmp_path, monkeypatch):
    fixed, moving, field = scan(tmp_path / "f.nii.gz"), scan(tmp_path / "m.nii.gz", 1), tmp_path / "transform.h5"
    image = sitk.Image(20, 18, 16, sitk.sitkVectorFloat64)
    sitk.WriteTransform(sitk.DisplacementFieldTransform(image), str(field))
    (tmp_path / "pairs.csv").write_text("name,fixed,moving,init\np,f.nii.gz,m.nii.gz,transform.h5")
    flags = ["-c", "mind", "--inverse", "-o", tmp_path / "out", *QUICK]
    monkeypatch.setattr("nnssl_ext.registration.pipeline.register_pair", lambda *_: pytest.fail("too late"))
    with pytest.raises(NnsslError, match=r"transform\.h5 cannot be inverted") as told:
        call(monkeypatch, "-f", fixed, "-m", moving, "--init", field, *flags)
    assert "--inverse" in told.value.fix and not (tmp_path / "out").exists()
    assert call(monkeypatch, "--pairs", tmp_path / "pairs.csv", *flags) == 2
    assert "cannot be inverted" in read_json(tmp_path / "out" / "failures.json")["p"]
