"""``nnssl_doctor`` tells a healthy environment from a broken one, and how to mend the latter."""

import json
import os

import pytest

from nnssl_ext.nnunet_plugin import health
from nnssl_ext.nnunet_plugin.startup import PARAMETERS


@pytest.fixture
def healthy(monkeypatch) -> dict:
    """What the probe says where all is well; spares the tests the import of torch."""
    found = {
        "hooked": True,
        "parameters": [*PARAMETERS, "verbose"],
        "lookups": {"nnsslPlannerPrimusTiny": None},
        "imports": {"torchvision": None, "timm": None},
        "cuda": [],
        "cuda_build": None,
        "mps": False,
        "threads": 1,
    }
    monkeypatch.setattr(health, "_probe", lambda: found)
    monkeypatch.delenv("NNSSL_EXT_DISABLE", raising=False)
    return found


def by_name() -> dict[str, health.Check]:
    return {check.name: check for check in health.checks()}


def failures() -> set[str]:
    return {check.name for check in health.checks() if check.status == "fail"}


def test_real_environment_is_healthy(nnunet_env):
    done = nnunet_env.run("nnssl_doctor", "--json")
    said = json.loads(done.stdout)
    assert said["healthy"] is True
    (hook,) = [check for check in said["checks"] if check["name"] == "hook"]
    assert "live" in hook["says"]


def test_missing_variable_fails_and_shows_the_line_that_sets_it(nnunet_env, healthy, monkeypatch):
    assert failures() == set()
    monkeypatch.delenv("nnssl_results")
    assert failures() == {"nnssl_results"}
    assert by_name()["nnssl_results"].fix == "export nnssl_results=/path/to/nnssl_results"


def test_missing_folder(nnunet_env, healthy, monkeypatch):
    nnunet_env.results.rmdir()
    assert failures() == {"nnUNet_results"}
    assert by_name()["nnUNet_results"].fix == f"mkdir -p {nnunet_env.results}"
    monkeypatch.setenv("nnUNet_results", "/my scans")
    assert by_name()["nnUNet_results"].fix == "mkdir -p '/my scans'"


def test_unwritable_folders(nnunet_env, healthy, monkeypatch):
    monkeypatch.setattr(health, "_writable", lambda path: path not in (nnunet_env.raw, nnunet_env.preprocessed))
    assert failures() == {"nnUNet_preprocessed"}
    assert by_name()["nnUNet_raw"].status == "warn"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folder_is_noticed(tmp_path):
    tmp_path.chmod(0o500)
    assert not health._writable(tmp_path)


def test_full_disk_is_a_warning(nnunet_env, healthy, monkeypatch):
    monkeypatch.setattr(health, "LOW_DISK_GB", 1e9)
    assert by_name()["nnUNet_results"].status == "warn"


def test_hook_off_not_live_or_incomplete(nnunet_env, healthy, monkeypatch):
    healthy["lookups"]["nnsslFinetuneTrainer"] = "ImportError: no timm"
    assert "nnsslFinetuneTrainer: ImportError: no timm" in by_name()["hook"].fix
    healthy["hooked"] = False
    assert "not live" in by_name()["hook"].says
    monkeypatch.setenv("NNSSL_EXT_DISABLE", "1")
    assert by_name()["hook"].fix == "unset NNSSL_EXT_DISABLE"
    assert failures() == {"hook"}


def test_changed_lookup_signature(nnunet_env, healthy):
    healthy["parameters"] = ["name", "folder"]
    assert failures() == {"class lookup"}


def test_probe_that_dies_is_reported(monkeypatch):
    monkeypatch.setattr(health.sys, "executable", "/bin/false")
    found = health._probe()
    assert isinstance(found, health.Check)
    assert found.status == "fail"


def test_versions_are_held_against_the_requirements(nnunet_env, healthy, monkeypatch):
    real = health.version
    monkeypatch.setattr(health, "version", lambda name: "2.7.0" if name == "nnunetv2" else real(name))
    found = by_name()["nnunetv2"]
    assert found.status == "fail"
    assert ">=2.8.1" in found.says


def test_broken_torchvision_is_a_warning(nnunet_env, healthy):
    healthy["imports"]["torchvision"] = "RuntimeError: operator torchvision::nms does not exist"
    assert by_name()["import torchvision"].status == "warn"
    assert failures() == set()


def test_threads(nnunet_env, healthy, monkeypatch):
    assert by_name()["threads"].status == "ok"
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    assert by_name()["threads"].fix == "export nnUNet_n_proc_DA=1"
    monkeypatch.delenv("nnUNet_n_proc_DA")
    monkeypatch.setattr(health, "_cores", lambda: 2)
    assert by_name()["threads"].fix == "export nnUNet_n_proc_DA=1"
    monkeypatch.setattr(health, "_cores", lambda: 32)
    assert by_name()["threads"].status == "ok"
