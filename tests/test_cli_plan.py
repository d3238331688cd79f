"""``nnssl_plan`` in this process on small synthetic data sets."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from preprocessed_cases import save_case
from test_planners_plans import write_dataset

from nnssl_ext.catalogue import pretraining_methods
from nnssl_ext.cli import plan as plan_command
from nnssl_ext.errors import NnsslError
from nnssl_ext.networks.dino_head import DINOHead, HeadSettings
from nnssl_ext.planners.memory import Views
from nnssl_ext.planners.primus import nnsslPlannerPrimusTiny
from nnssl_ext.planners.resenc import nnsslPlannerResEncTiny

VIEWS = {
    "MAETrainer": Views(1, 0),
    "DisruptiveAETrainer": Views(1, 0),
    "RegistrationTrainer": Views(2, 0),
    "SimSiamTrainer": Views(0, 4),  # 2 pairs of local crops
    "Vox2VecTrainer": Views(0, 8),  # 4 pairs around an anchor each
    "HierarchicalDenseTrainer": Views(0, 8),
    "DINO3DTrainer": Views(2, 4, teacher=True),
    "IBOTTrainer": Views(2, 4, teacher=True),
}
TINY = "nnsslPlannerPrimusTiny"


def call(monkeypatch, *flags: str) -> None:
    monkeypatch.setattr("sys.argv", ["nnssl_plan", "9", "-pl", TINY, *map(str, flags)])
    monkeypatch.setattr(plan_command, "_hours", lambda *_: "")  # measures this machine
    assert plan_command._main() == 0


@pytest.mark.parametrize("method", pretraining_methods())
def test_the_plan_command_asks_a_method_what_it_draws(nnunet_env, method):
    write_dataset(nnunet_env, (56, 72, 56), cases=1)
    plans = nnsslPlannerPrimusTiny(9).make_plans()
    found = plan_command._views(plans, method)
    assert replace(found, heads=0, logits=0) == VIEWS[method]
    if not VIEWS[method].teacher:
        assert found.logits == 0
        return
    settings = HeadSettings(prototypes=1024, hidden=512, bottleneck=64)
    head = sum(weight.numel() for weight in DINOHead(144, settings).parameters() if weight.requires_grad)
    assert found.heads - 144 in (head, 2 * head)  # a token to show for hidden ones
    tokens, ratio = 24**3 // 4**3, {"DINO3DTrainer": (0.2 + 0.75) / 2, "IBOTTrainer": (0.1 + 0.5) / 2}[method]
    assert found.logits / 1024 == pytest.approx(6 + 2 * 0.5 * ratio * tokens, rel=0.15)


def test_plans_for_many_views_have_smaller_batches(nnunet_env, monkeypatch, tmp_path):
    write_dataset(nnunet_env, (56, 72, 56))
    (nnunet_env.preprocessed / "Dataset009_Boxes" / "dataset.json").write_text("{}")
    flags = (
        "-pl",
        "nnsslPlannerPrimusTiny",
        "-gpu_memory_target",
        "1.3",
        "--write",
        "--png",
        str(tmp_path / "crops.png"),
    )
    batch = {}
    for method in ("MAETrainer", "DINO3DTrainer"):
        monkeypatch.setattr("sys.argv", ["nnssl_plan", "9", *flags, "-tr", method])
        assert plan_command._main() == 0
        written = json.loads((nnunet_env.preprocessed / "Dataset009_Boxes" / "nnsslPrimusTinyPlans.json").read_text())
        batch[method] = written["configurations"]["3d_fullres"]["nnssl"]["batch_size"]
    assert batch["DINO3DTrainer"] < batch["MAETrainer"]


def preprocess(folder: Path) -> None:
    save_case(folder, "case0", np.random.default_rng(0).normal(size=(1, 40, 40, 40)).astype(np.float32))


@pytest.mark.parametrize(
    ("channel", "changed"),
    [("MRI", ("-overwrite_target_spacing", 2, 2, 2)), ("CT", ("--window", -100, 300))],
)
def test_data_of_the_old_plans_are_told(nnunet_env, monkeypatch, capsys, tmp_path, channel, changed):
    """Training would take them as they are."""
    write_dataset(nnunet_env, (40, 40, 40), channels=(channel,), cases=1)
    png = tmp_path / "crops.png"
    call(monkeypatch, "--write", "--png", png)
    assert "no preprocessed data" in capsys.readouterr().out
    folder = nnunet_env.preprocessed / "Dataset009_Boxes" / "nnsslPrimusTinyPlans_3d_fullres"
    preprocess(folder)
    command = "run: nnUNetv2_preprocess -d 9 -plans_name nnsslPrimusTinyPlans -c 3d_fullres"
    call(monkeypatch, *changed, "--png", png)
    told = capsys.readouterr().out
    assert f"data in {folder} are of the old plans" in told
    assert f"-> repeat this command with --write, then {command}" in told
    call(monkeypatch, "--write", "--batch_size", 2, "--png", png)
    assert "old plans" not in capsys.readouterr().out and png.is_file()
    call(monkeypatch, "--write", *changed, "--png", png)
    told = capsys.readouterr().out
    assert f"data in {folder} are of the old plans" in told and f"-> {command}" in told


@pytest.mark.parametrize(
    ("flags", "command"),
    [
        ((), "run: nnUNetv2_plan_and_preprocess -d 9 -pl nnsslPlannerPrimusTiny -c 3d_fullres"),
        (("--write",), "run: nnUNetv2_preprocess -d 9 -plans_name P -c 3d_fullres"),
        (("--patch_size", "16", "16", "16"), "repeat this command with --write, then run: nnUNetv2_preprocess"),
        (("-tr", "DINO3DTrainer"), "repeat this command with --write, then run: nnUNetv2_preprocess"),
    ],
)
def test_the_stock_planning_command_is_named_only_for_what_it_would_plan(flags, command):
    args = plan_command.parser().parse_args(["9", "-pl", TINY, "--png", "here.png", *flags])
    assert plan_command._preprocess(args, "P").startswith(command)


def test_names_and_threads_that_nnunet_cannot_take_are_named(nnunet_env, monkeypatch):
    write_dataset(nnunet_env, (40, 40, 40), cases=1)
    with pytest.raises(NnsslError, match="'a__b' cannot be part of a plans name"):
        call(monkeypatch, "-overwrite_plans_name", "a__b")
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    with pytest.raises(NnsslError, match="nnUNet_n_proc_DA=0"):
        nnsslPlannerResEncTiny(9).make_plans()


def test_a_picture_that_cannot_be_written_says_so(nnunet_env, monkeypatch, capsys, tmp_path):
    write_dataset(nnunet_env, (40, 40, 40), cases=1)
    (tmp_path / "file").touch()
    preprocess(nnunet_env.preprocessed / "Dataset009_Boxes" / "nnsslPrimusTinyPlans_3d_fullres")
    nnsslPlannerPrimusTiny(9).plan_experiment()
    call(monkeypatch, "--png", tmp_path / "file" / "crops.png")
    assert f"-> make {tmp_path / 'file'} writable" in capsys.readouterr().out
