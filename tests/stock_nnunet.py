"""Run by test_plugin_stock.py in other interpreters: stock nnU-Net plans, trains one step, and looks for our classes.

``python stock_nnunet.py DATASET_ID OUR_CLASS OUR_CURRENT_MODULE`` prints one line of JSON.
"""

import json
import multiprocessing
import os
import sys
from os.path import join
from typing import Any


def lookup(name: str, current_module: str) -> str | None:
    """The module of the class that nnU-Net finds, None for no class, or the error in one line."""
    import nnunetv2
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

    folder = join(nnunetv2.__path__[0], *current_module.split(".")[1:])
    try:
        found: Any = recursive_find_python_class(folder, name, current_module=current_module)
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    return found.__module__ if found else None


def plan(dataset: int) -> str:
    """Plan with stock nnU-Net's planner; returns the name of the plans."""
    from nnunetv2.experiment_planning.plan_and_preprocess_api import plan_experiments

    return str(plan_experiments([dataset], "ResEncUNetPlanner"))


def train_one_step(dataset: int, plans_name: str) -> float:
    """Start a stock trainer, found by its name, and return the loss of its first step."""
    import torch
    from nnunetv2.run.run_training import get_trainer_from_args

    trainer = get_trainer_from_args(
        str(dataset), "3d_fullres", 0, "nnUNetTrainer_5epochs", plans_name, device=torch.device("cpu")
    )
    trainer.plans_manager.plans["configurations"]["3d_fullres"]["batch_size"] = 2
    trainer.configuration_manager.configuration["batch_size"] = 2
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    return float(trainer.train_step(next(trainer.dataloader_train))["loss"])


if __name__ == "__main__":
    dataset, name, current_module = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    plans_name = plan(dataset)
    os.environ["nnUNet_n_proc_DA"] = "0"  # augment in this process; planning would crash at 0
    loss = train_one_step(dataset, plans_name)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        spawned = pool.apply(lookup, (name, current_module))
    print(json.dumps({"plans": plans_name, "loss": loss, "ours": lookup(name, current_module), "spawned": spawned}))
