"""What is not there is named together with the command that makes it."""

import json

import pytest
from tiny_dataset import CONFIGURATION, DATASET, write_dataset

from nnssl_ext.cli import plan as plan_command
from nnssl_ext.cli import train
from nnssl_ext.errors import NnsslError
from nnssl_ext.paths import dataset_id, dataset_name
from nnssl_ext.plans import read_plans


@pytest.mark.parametrize(
    ("given", "number"), [("Dataset004_Hippocampus", "4"), ("12", "12"), (12, "12"), ("Lung", "Lung")]
)
def test_stock_commands_get_an_id(given, number):
    assert dataset_id(given) == number


def test_an_unknown_dataset_names_the_command_that_creates_it(nnunet_env):
    with pytest.raises(NnsslError, match=r"known: none; .*nnUNetv2_plan_and_preprocess -d 7 -pl PLANNER"):
        dataset_name("Dataset007_Pancreas")
    with pytest.raises(NnsslError, match=r"nnssl_convert -h"):
        dataset_name(7, "nnUNet_raw")


@pytest.mark.parametrize("plans", ["nnsslPrimusTinyPlan", "myPlans"])
def test_missing_plans_suggest_no_planner_that_does_not_exist(nnunet_env, plans):
    (nnunet_env.preprocessed / DATASET).mkdir()
    with pytest.raises(NnsslError) as refused:
        read_plans(DATASET, plans)
    assert "-pl" not in str(refused.value)


def test_missing_plans_of_a_planner_name_its_command(nnunet_env):
    (nnunet_env.preprocessed / DATASET).mkdir()
    with pytest.raises(NnsslError, match=r"nnUNetv2_plan_and_preprocess -d 901 -pl nnsslPlannerPrimusM -c 3d_fullres"):
        read_plans(DATASET, "nnsslPrimusMPlans")


def test_the_preview_of_an_unknown_dataset_is_a_message(nnunet_env):
    (nnunet_env.raw / DATASET).mkdir()
    args = plan_command.parser().parse_args(["77", "-pl", "nnsslPlannerPrimusTiny"])
    with pytest.raises(NnsslError, match=rf"'77'\n.*known: {DATASET}"):
        plan_command._planner(args)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "run: nnUNetv2_plan_and_preprocess -d 901 -pl nnsslPlannerPrimusTiny -c 3d_fullres"),
        (
            ["-overwrite_plans_name", "big"],
            "repeat this command with --write, then run: nnUNetv2_preprocess -d 901 -plans_name big -c 3d_fullres",
        ),
        (["-overwrite_plans_name", "big", "--write"], "run: nnUNetv2_preprocess -d 901 -plans_name big -c 3d_fullres"),
    ],
)
def test_the_preview_names_the_command_that_preprocesses_its_plans(flags, words):
    args = plan_command.parser().parse_args([DATASET, "-pl", "nnsslPlannerPrimusTiny", *flags])
    assert plan_command._preprocess(args, args.overwrite_plans_name or "nnsslPrimusTinyPlans") == words


def test_help_about_a_job_shows_the_defaults_of_its_plans(nnunet_env, monkeypatch, capsys):
    base = write_dataset(nnunet_env.preprocessed)
    plans = json.loads((base / "nnsslPrimusTinyPlans.json").read_text())
    assert plans["configurations"][CONFIGURATION]["nnssl"]["preset"] == "PrimusTiny"

    def shown(*flags: str) -> str:
        monkeypatch.setattr("sys.argv", ["nnssl_train", *flags, "-tr", "MAETrainer", "-h"])
        with pytest.raises(SystemExit) as end:
            train.main()
        assert end.value.code == 0
        return " ".join(capsys.readouterr().out.split("settings of MAETrainer, ", 1)[1].replace("│", " ").split())

    told = (
        "--epochs INT 1000 x 250 optimiser steps (nnssl's length); an epoch is the interval of logging. (default: {})"
    )
    assert told.format(1000) in shown()
    assert told.format(40) in shown(DATASET, CONFIGURATION, "-p", "nnsslPrimusTinyPlans")
