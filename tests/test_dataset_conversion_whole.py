"""Whole or not at all: dry runs, full disks, kills, workers that die."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from scans import decathlon, files_below, voxels, write

from nnssl_ext.dataset_conversion import one_case
from nnssl_ext.dataset_conversion.folder import plan_folder
from nnssl_ext.dataset_conversion.foreground import add_foreground
from nnssl_ext.dataset_conversion.msd import plan_msd
from nnssl_ext.dataset_conversion.raw_dataset import convert
from nnssl_ext.dataset_conversion.whole_folder import whole_folder
from nnssl_ext.errors import NnsslError


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_dry_run_checks_all_and_writes_nothing(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    task = decathlon(tmp_path / "Task77_Demo")
    done = convert(plan_msd(task)[1], raw / "Dataset001_Demo", dry_run=True)
    assert [(case.identifier, case.shape, case.values) for case in done.cases] == [
        ("case_1", (10, 12, 14), (0, 1, 2)),
        ("case_2", (10, 12, 14), (0, 1, 2)),
    ]
    assert everything(raw) == set()


def test_two_processes_write_what_one_writes(tmp_path):
    planned = plan_msd(decathlon(tmp_path / "Task77_Demo", ("A", "B"), tuple("abcd")))[1]
    convert(planned, tmp_path / "1" / "Dataset001_Demo")
    convert(planned, tmp_path / "2" / "Dataset001_Demo", processes=2)
    one, two = tmp_path / "1" / "Dataset001_Demo", tmp_path / "2" / "Dataset001_Demo"
    assert files_below(one) == files_below(two)
    assert (one / "dataset.json").read_text() == (two / "dataset.json").read_text()
    assert (one / "imagesTr" / "c_0001.nii.gz").read_bytes() == (two / "imagesTr" / "c_0001.nii.gz").read_bytes()


def test_full_disk_while_copying(tmp_path, monkeypatch):
    planned = plan_msd(decathlon(tmp_path / "Task77_Demo"))[1]
    copied = []

    def copy(source, target):
        if len(copied) == 2:
            Path(target).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        copied.append(Path(target).write_bytes(Path(source).read_bytes()))

    monkeypatch.setattr(one_case.shutil, "copyfile", copy)
    raw = tmp_path / "raw"
    with pytest.raises(NnsslError) as caught:
        convert(planned, raw / "Dataset001_Demo", skip_bad=True)  # skipping does not help here
    told = str(caught.value)
    assert "cannot write" in told and "imagesTr/case_2_0000.nii.gz: [Errno 28] No space left on device" in told
    assert "GiB free" in told and "free space there" in told
    assert len(copied) == 2 and everything(raw) == set()


FULL_DISK = """
import resource, sys
from pathlib import Path
from nnssl_ext.dataset_conversion.folder import plan_folder
from nnssl_ext.dataset_conversion.raw_dataset import convert
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
convert(plan_folder(Path(sys.argv[1]), channels=["MRI"]), Path(sys.argv[2]) / "Dataset001_Demo")
"""


@pytest.mark.parametrize("ending", [".nrrd", ".nii.gz"])
def test_files_that_really_come_out_short(tmp_path, ending):
    """The operating system cuts files at 20 kB: SimpleITK's NIfTI writer says nothing, copying raises."""
    write(tmp_path / "in" / f"scan{ending}", voxels(0, (20, 30, 40)))
    raw = tmp_path / "raw"
    command = [sys.executable, "-c", FULL_DISK, tmp_path / "in", raw]
    finished = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert finished.returncode == 1
    assert "cannot write" in finished.stderr and "scan_0000.nii.gz" in finished.stderr
    assert "truncated" in finished.stderr or "File too large" in finished.stderr
    assert everything(raw) == set()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_that_is_not_writable(tmp_path):
    write(tmp_path / "in" / "scan.nii.gz", voxels())
    (tmp_path / "raw").mkdir(mode=0o500)
    with pytest.raises(NnsslError, match="cannot write"):
        convert(plan_folder(tmp_path / "in", channels=["MRI"]), tmp_path / "raw" / "Dataset001_Demo")


def test_a_place_that_is_a_file(tmp_path):
    write(tmp_path / "in" / "scan.nii.gz", voxels())
    (tmp_path / "raw").write_text("no folder")
    with pytest.raises(NnsslError, match="cannot write"):
        convert(plan_folder(tmp_path / "in", channels=["MRI"]), tmp_path / "raw" / "Dataset001_Demo")


def test_target_is_never_overwritten(tmp_path):
    write(tmp_path / "in" / "scan.nii.gz", voxels())
    target = tmp_path / "Dataset001_Demo"
    target.mkdir()
    with pytest.raises(NnsslError, match="exists already"):
        convert(plan_folder(tmp_path / "in", channels=["MRI"]), target)
    target.rmdir()
    with pytest.raises(NnsslError, match="came into being meanwhile"), whole_folder(target):
        target.mkdir()
    assert everything(tmp_path / "Dataset001_Demo") == set()


SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit it ignored
from pathlib import Path
from nnssl_ext.dataset_conversion.whole_folder import whole_folder
with whole_folder(Path(sys.argv[1])) as building:
    (building / "imagesTr").mkdir()
    (building / "imagesTr" / "a.nii.gz").write_bytes(b"x")
    print("started", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_killed_conversion_leaves_nothing(tmp_path, how):
    target = tmp_path / "raw" / "Dataset001_Demo"
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, target], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout and process.stdout.readline() == "started\n"
    process.send_signal(how)
    process.wait(timeout=30)
    if how != signal.SIGKILL:
        assert everything(target.parent) == set()
        return
    (left,) = target.parent.iterdir()
    assert left.name.startswith(".")  # nnU-Net lists Dataset*
    with whole_folder(target):
        pass
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_what_a_container_of_the_same_name_and_process_number_left_is_no_obstacle(tmp_path):
    target, host = tmp_path / "Dataset001_Demo", socket.gethostname()
    ours, of_another = (tmp_path / f".{target.name}.partial-{host}{end}" for end in (f"-{os.getpid()}", "-2-1234"))
    for left in (ours, of_another):
        left.mkdir()
    with whole_folder(target) as building:
        assert building == ours
    assert sorted(tmp_path.iterdir()) == sorted([target, of_another])


def test_a_running_conversion_is_not_taken_for_a_dead_one(tmp_path):
    target = tmp_path / "Dataset001_Demo"
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, target], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout and process.stdout.readline() == "started\n"
        with whole_folder(target):
            assert len([path for path in tmp_path.iterdir() if path.name.startswith(".")]) == 2
    finally:
        process.kill()
        process.wait(timeout=30)


def test_foreground_interrupted_leaves_an_unlabelled_dataset(tmp_path, monkeypatch):
    dataset = tmp_path / "Dataset009_X"
    for seed, name in enumerate("ab"):
        write(dataset / "imagesTr" / f"{name}_0000.nii.gz", voxels(seed))
    (dataset / "dataset.json").write_text(json.dumps({"channel_names": {"0": "CT"}, "file_ending": ".nii.gz"}))
    before = everything(dataset)
    monkeypatch.setattr(one_case.sitk, "WriteImage", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(NnsslError, match=r"cannot write .*full"):
        add_foreground(dataset)
    assert everything(dataset) == before
    monkeypatch.undo()
    add_foreground(dataset)
    assert everything(dataset) == before | {"labelsTr", "labelsTr/a.nii.gz", "labelsTr/b.nii.gz"}


def test_worker_that_is_killed_is_told(tmp_path):
    from nnssl_ext.dataset_conversion.raw_dataset import in_parallel

    with pytest.raises(NnsslError, match="a worker process was killed") as caught:
        list(in_parallel(os._exit, [1, 1], 2, "dying"))
    assert "-np 1" in str(caught.value)


SLEEPY = """
import os, time
from nnssl_ext.dataset_conversion.raw_dataset import in_parallel
if __name__ == "__main__":
    for _, process in in_parallel(os.getpgid, [0, 0, 0, 0], 2, "x"):
        print("started", flush=True)
        time.sleep(60)
"""


def test_workers_do_not_outlive_a_killed_parent(tmp_path):
    script = tmp_path / "sleepy.py"
    script.write_text(SLEEPY)
    process = subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert process.stdout and process.stdout.readline() == "started\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=30)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)  # anyone left in its group?
        except ProcessLookupError:
            return
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    pytest.fail("workers were still there 20 s after their parent")
