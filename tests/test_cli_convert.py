"""The nnssl_convert command in fresh processes, on real scans, and stock nnU-Net on what it wrote."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from scans import decathlon, files_below, labelled_folder, truncate, voxels, write


def test_importing_the_command_loads_no_torch():
    code = "import sys, nnssl_ext.cli.convert; print(sorted({'torch', 'SimpleITK', 'nibabel'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"


def test_converting_loads_no_torch():
    code = "import sys, nnssl_ext.dataset_conversion.patches, nnssl_ext.dataset_conversion.msd; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"


def test_real_hippocampus(nnunet_env, test_data):
    task = test_data / "Task04_Hippocampus"
    told = nnunet_env.run("nnssl_convert", "msd", task, "-d", 4, "--limit", 3, "--dry-run", "-np", 1)
    assert "case             voxels zyx  mm zyx  labels  labelled  files" in told.stdout
    assert "hippocampus_001  35x51x35    1x1x1   0-2     4.7%      copied+copied" in told.stdout
    assert (
        f"would write 3 cases, channels MRI, labels background, Anterior, Posterior in {nnunet_env.raw}" in told.stdout
    )
    assert not list(nnunet_env.raw.iterdir())
    told = nnunet_env.run("nnssl_convert", "msd", task, "-d", 4, "--limit", 3, "-np", 2)
    assert "wrote 3 cases" in told.stdout and "next: nnUNetv2_plan_and_preprocess -d 4" in told.stdout
    assert "3/3" in told.stderr  # the progress bar
    target = nnunet_env.raw / "Dataset004_Hippocampus"
    assert len(files_below(target)) == 7
    source = task / "imagesTr" / "hippocampus_001.nii.gz"
    assert (target / "imagesTr" / "hippocampus_001_0000.nii.gz").read_bytes() == source.read_bytes()
    told = nnunet_env.run("nnssl_convert", "msd", task, "-d", 4, check=False)
    assert told.returncode == 2
    assert told.stderr.splitlines() == [
        f"error: dataset id 4 is taken: {target}",
        "  -> choose another, e.g. -d 5, or remove that folder",
    ]


def test_what_was_preprocessed_of_an_earlier_dataset_of_the_name_is_told(nnunet_env, tmp_path):
    images, _ = labelled_folder(tmp_path)
    earlier = nnunet_env.preprocessed / "Dataset005_X"
    earlier.mkdir()
    command = ("nnssl_convert", "folder", images, "-d", 5, "--name", "X", "--channels", "CT", "-np", 1)
    told = nnunet_env.run(*command).stdout
    assert f"note: {earlier} is of an earlier Dataset005_X" in told and told.rstrip().endswith("--clean")


def test_bad_input_ends_with_code_2_and_skip_bad_goes_on(nnunet_env, tmp_path):
    images, labels = labelled_folder(tmp_path)
    truncate(images / "b.nii.gz")
    command = (
        "nnssl_convert",
        "folder",
        images,
        "-d",
        5,
        "--name",
        "X",
        "--channels",
        "CT",
        "--labels",
        labels,
        "-np",
        1,
    )
    for extra in ((), ("--dry-run",)):
        told = nnunet_env.run(*command, *extra, check=False)
        assert told.returncode == 2
        assert f"1. case b: {images / 'b.nii.gz'}: truncated or damaged" in told.stderr
        assert "Traceback" not in told.stderr
        assert ("BAD" in told.stdout) == bool(extra)
    assert not list(nnunet_env.raw.iterdir())
    told = nnunet_env.run(*command, "--skip-bad")
    assert "wrote 2 cases" in told.stdout
    assert "left out 1 case(s)" in told.stderr and f"case b: {images / 'b.nii.gz'}" in told.stderr


def test_every_source_has_a_command(nnunet_env, tmp_path):
    write(tmp_path / "bids" / "sub-1" / "anat" / "sub-1_T1w.nii.gz", voxels())
    nnunet_env.run("nnssl_convert", "bids", tmp_path / "bids", "-d", 11, "--name", "Bids", "-np", 1)
    nnunet_env.run("nnssl_convert", "export-nnssl", "-d", 11, "--subject-pattern", "sub-[0-9]+")
    listing = nnunet_env.raw / "Dataset011_Bids" / "pretrain_data.json"
    assert list(json.loads(listing.read_text())["datasets"]["011"]["subjects"]) == ["sub-1"]
    nnunet_env.run("nnssl_convert", "nnssl", listing, "-d", 12, "--name", "Back", "-np", 1)
    told = nnunet_env.run("nnssl_convert", "patches", "-d", 12, "-o", 13, "--size", 6, 6, 6, "--count", 2, "-np", 1)
    assert "wrote 2 cases" in told.stdout and (nnunet_env.raw / "Dataset013_BackPatches" / "patches.json").is_file()
    told = nnunet_env.run("nnssl_convert", "msd", decathlon(tmp_path / "t"), "-d", 14, "--name", "Task", "-np", 1)
    assert (nnunet_env.raw / "Dataset014_Task").is_dir()


@pytest.mark.slow
def test_stock_integrity_check_passes_on_what_is_written(nnunet_env, test_data, tmp_path):
    """Labelled; image-only made whole by `nnssl_convert foreground`; patches of an unlabelled CT."""
    nnunet_env.run("nnssl_convert", "msd", test_data / "Task04_Hippocampus", "-d", 4, "--limit", 4, "-np", 1)
    (tmp_path / "ct").mkdir()
    (tmp_path / "ct" / "a.nii.gz").symlink_to(test_data / "ct_mr_examples" / "example_ct_sm.nii.gz")
    nnunet_env.run("nnssl_convert", "folder", tmp_path / "ct", "-d", 5, "--name", "Ct", "--channels", "CT", "-np", 1)
    bare = nnunet_env.raw / "Dataset006_Bare"
    for path in (nnunet_env.raw / "Dataset004_Hippocampus" / "imagesTr").iterdir():
        (bare / "imagesTr").mkdir(parents=True, exist_ok=True)
        (bare / "imagesTr" / path.name).write_bytes(path.read_bytes())
    nnunet_env.run("nnssl_convert", "foreground", "-d", 6, "--channels", "MRI", "-np", 1)
    nnunet_env.run("nnssl_convert", "patches", "-d", 5, "-o", 7, "--size-mm", 60, 60, 60, "--count", 2, "-np", 1)
    told = nnunet_env.run("nnUNetv2_extract_fingerprint", "-d", 4, 6, 7, "-np", 1, "--verify_dataset_integrity")
    assert told.stdout.count("verify_dataset_integrity Done.") == 3
    assert "Warning" not in told.stdout and "Error" not in told.stdout
    for name in ("Dataset004_Hippocampus", "Dataset006_Bare", "Dataset007_CtPatches"):
        assert (nnunet_env.preprocessed / name / "dataset_fingerprint.json").is_file()
