"""What ``nnssl_train`` refuses before it starts anything: one message that names the flag."""

from __future__ import annotations

import sys

import pytest
from tiny_dataset import job_of, write_dataset

from nnssl_ext.cli import train
from nnssl_ext.errors import NnsslError
from nnssl_ext.files import read_json, write_json


@pytest.fixture
def dataset(nnunet_env):
    return write_dataset(nnunet_env.preprocessed)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *((flag, "0") for flag in ("--batch_size", "--epochs", "--iterations", "-num_gpus", "--optim.accumulate")),
        *(
            ("--seed", "-1"),
            ("--optim.lr", "-1"),
            ("--optim.lr", "nan"),
            ("--optim.clip", "0"),
            ("--optim.warmup", "-1"),
        ),
        *(("--optim.weight_decay", "-1"), ("--optim.final_lr", "nan")),
    ],
)
def test_values_out_of_range_are_refused_by_their_flag(dataset, flag, value):
    with pytest.raises(NnsslError, match=f"^{flag} {value}"):
        job_of(flag, value)


@pytest.mark.parametrize(("flags", "weight"), [((), 0.1), (("--batch_size", "8"), 0.1), (("--batch_size", "7"), 0.0)])
def test_defaults_that_follow_the_batch_follow_that_of_the_run(dataset, flags, weight):
    """KoLeo needs eight neighbours in a step, whatever the plans say."""
    plans = dataset / "nnsslPrimusTinyPlans.json"
    content = read_json(plans)
    content["configurations"]["3d_fullres"]["nnssl"] |= {"preset": "PrimusM", "batch_size": 16}
    write_json(plans, content)
    assert job_of(*flags, method="DINO3DTrainer").settings.koleo_weight == weight


def test_a_scan_is_no_list_of_cases(dataset, tmp_path):
    (tmp_path / "scan.nii.gz").write_bytes(b"\x1f\x8b\xff")
    with pytest.raises(NnsslError, match=r"cannot read the case list .*scan\.nii\.gz"):
        job_of("--cases", str(tmp_path / "scan.nii.gz"))


def test_flags_before_the_dataset_are_told(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["nnssl_train", "--epochs", "1"])
    with pytest.raises(SystemExit):
        train._main()
    assert "come first, before any flag" in capsys.readouterr().err
