"""The hook's mechanics, on a stand-in for nnU-Net that has only the one module, in fresh interpreters without torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

LOOKUP_SOURCE = """
def recursive_find_python_class(folder, class_name, current_module, base_folder=None):
    return f"stock {class_name}" if class_name.startswith("Stock") else None
"""
CONSUMER_SOURCE = """
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

def ask(name, where="nnunetv2.experiment_planning"):
    return recursive_find_python_class("anywhere", name, current_module=where)
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with the stand-in nnunetv2 and a copy of our plugin with one planner in its registry."""
    utilities = tmp_path / "nnunetv2" / "utilities"
    utilities.mkdir(parents=True)
    (tmp_path / "nnunetv2" / "__init__.py").touch()
    (utilities / "__init__.py").touch()
    (utilities / "find_class_by_name.py").write_text(LOOKUP_SOURCE)
    (tmp_path / "nnunetv2" / "consumer.py").write_text(CONSUMER_SOURCE)
    ours = tmp_path / "nnssl_ext"
    root = Path(__file__).resolve().parent.parent / "nnssl_ext"
    for source in ("__init__.py", "errors.py", *(f"nnunet_plugin/{n}.py" for n in ("__init__", "startup", "registry"))):
        (ours / source).parent.mkdir(exist_ok=True, parents=True)
        (ours / source).write_text((root / source).read_text())
    for room in ("planners", "trainers", "trainers/finetuning"):
        (ours / room).mkdir()
        (ours / room / "__init__.py").touch()
    (ours / "planners" / "fine.py").write_text("class nnsslPlannerFine: ...\nclass Helper: ...\n")
    (ours / "planners" / "broken.py").write_text(
        "raise ImportError('timm is too old')\nclass nnsslPlannerBroken: ...\n"
    )
    (ours / "trainers" / "finetuning" / "own.py").write_text("class nnsslOwnTrainer: ...\n")
    return tmp_path


START = "import nnssl_ext.nnunet_plugin.startup as startup; startup.install()\n"


def python(site: Path, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "NNSSL_EXT_DISABLE"}
    return subprocess.run(
        [sys.executable, "-S", "-c", code],  # -S: no site-packages, hence no installed nnU-Net and no start-up file
        env={**env, "PYTHONPATH": str(site), **environment},
        cwd=site.parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def answer(site: Path, expression: str, start: str = START, **environment: str) -> str:
    done = python(site, f"{start}from nnunetv2.consumer import ask\nprint({expression})", **environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.strip()


def test_ours_and_stock_are_found(site):
    assert answer(site, "ask('nnsslPlannerFine')") == "<class 'nnssl_ext.planners.fine.nnsslPlannerFine'>"
    assert answer(site, "ask('StockPlanner')") == "stock StockPlanner"
    trainer = "ask('nnsslOwnTrainer', 'nnunetv2.training.nnUNetTrainer')"
    assert answer(site, trainer) == "<class 'nnssl_ext.trainers.finetuning.own.nnsslOwnTrainer'>"


def test_a_class_is_found_only_where_it_belongs(site):
    assert answer(site, "ask('nnsslPlannerFine', 'nnunetv2.imageio')") == "None"
    assert answer(site, "ask('nnsslPlannerFine', None)") == "None"


def test_late_installation_reaches_modules_that_hold_the_function(site):
    late = "import nnunetv2.consumer\n" + START
    assert "nnsslPlannerFine" in answer(site, "ask('nnsslPlannerFine')", start=late)
    assert answer(site, "ask('StockPlanner')", start=late) == "stock StockPlanner"


@pytest.mark.parametrize("start", [START * 2, START + "import nnunetv2.consumer\n" + START])
def test_installing_twice_hooks_once(site, start):
    wrapped = "__import__('nnunetv2.consumer').consumer.recursive_find_python_class.__wrapped__"
    assert "recursive_find_python_class" in answer(site, wrapped, start=start)
    assert answer(site, f"hasattr({wrapped}, '__wrapped__')", start=start) == "False"


def test_reloading_the_module_hooks_it_again(site):
    again = START + "import importlib, nnunetv2.utilities.find_class_by_name as m; importlib.reload(m)\n"
    assert "nnsslPlannerFine" in answer(site, "ask('nnsslPlannerFine')", start=again)


@pytest.mark.parametrize(("value", "found"), [("1", False), ("yes", False), ("0", True), ("", True)])
def test_switch(site, value, found):
    assert ("nnsslPlannerFine" in answer(site, "ask('nnsslPlannerFine')", NNSSL_EXT_DISABLE=value)) is found


def test_misspelt_name_of_ours_gets_the_right_one(site):
    done = python(site, f"{START}from nnunetv2.consumer import ask\nprint(ask('nnsslPlanerFin'))")
    assert done.stdout == "None\n"
    assert "did you mean 'nnsslPlannerFine'?" in done.stderr


def test_module_that_fails_gives_its_own_error_and_harms_no_other(site):
    done = python(
        site, f"{START}from nnunetv2.consumer import ask\nprint(ask('nnsslPlannerFine'))\nask('nnsslPlannerBroken')"
    )
    assert "nnsslPlannerFine" in done.stdout
    assert done.stderr.strip().endswith("ImportError: timm is too old")


def test_broken_registry_is_one_line_and_stock_classes_are_found(site):
    (site / "nnssl_ext" / "nnunet_plugin" / "registry.py").write_text("raise RuntimeError('on purpose')")
    done = python(site, f"{START}from nnunetv2.consumer import ask\nprint(ask('StockPlanner'), ask('StockPlanner'))")
    assert done.stdout == "stock StockPlanner stock StockPlanner\n"
    assert len(done.stderr.splitlines()) == 1
    assert "on purpose" in done.stderr


def test_a_changed_lookup_is_left_alone_with_one_line(site):
    changed = LOOKUP_SOURCE.replace(
        "folder, class_name, current_module", "class_name, folder=None, current_module=None"
    )
    (site / "nnunetv2" / "utilities" / "find_class_by_name.py").write_text(changed)
    code = (
        "from nnunetv2.utilities.find_class_by_name import recursive_find_python_class as f\nprint(f('StockPlanner'))"
    )
    done = python(site, START + code)
    assert done.stdout == "stock StockPlanner\n"
    assert len(done.stderr.splitlines()) == 1
    assert "nnssl_doctor" in done.stderr


def test_start_loads_next_to_nothing(site):
    code = f"import os, sys\nbefore = set(sys.modules)\n{START}print(*sorted(set(sys.modules) - before))"
    assert python(site, code).stdout.split() == [
        "__future__",
        *("nnssl_ext" + s for s in ("", ".nnunet_plugin", ".nnunet_plugin.startup")),
    ]
