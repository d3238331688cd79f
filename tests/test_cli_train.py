"""What ``nnssl_train`` refuses before it starts anything: one message that names the flag."""

from __future__ import annotations

import sys

import pytest
from tiny_dataset import job_of, write_dataset

from nnssl_ext.cli import train
from nnssl_ext.errors import NnsslError


@pytest.fixture
def dataset(nnunet_env):
    return write_dataset(nnunet_env.preprocessed)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *((flag, "0") for flag in ("--batch_size", "--epochs", "--iterations", "-num_gpus", "--optim.accumulate")),
        *(("--seed", "-1"), ("--optim.lr", "-1"), ("--optim.lr", "nan")),
    ],
)
def test_values_out_of_range_are_refused_by_their_flag(dataset, flag, value):
    with pytest.raises(NnsslError, match=f"^{flag} {value}"):
        job_of(flag, value)


def test_a_scan_is_no_list_of_cases(dataset, tmp_path):
    (tmp_path / "scan.nii.gz").write_bytes(b"\x1f\x8b\xff")
    with pytest.raises(NnsslError, match=r"cannot read the case list .*scan\.nii\.gz"):
        job_of("--cases", str(tmp_path / "scan.nii.gz"))


def test_flags_before_the_dataset_are_told(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["nnssl_train", "--epochs", "1"])
    with pytest.raises(SystemExit):
        train._main()
    assert "come first, before any flag" in capsys.readouterr().err
