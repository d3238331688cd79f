"""The registry, read off source text, is what importing the modules would find, and each class is what nnU-Net expects."""

import pkgutil
from importlib import import_module

import nnunetv2.experiment_planning.experiment_planners.default_experiment_planner as stock_planner
import nnunetv2.preprocessing.normalization.default_normalization_schemes as stock_normalization
import nnunetv2.training.nnUNetTrainer.nnUNetTrainer as stock_trainer
import pytest
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor

from nnssl_ext.nnunet_plugin.registry import ROOMS, registry

EXPECTED = {
    "nnunetv2.experiment_planning": (stock_planner.ExperimentPlanner, DatasetFingerprintExtractor),
    "nnunetv2.preprocessing": DefaultPreprocessor,
    "nnunetv2.preprocessing.normalization": stock_normalization.ImageNormalization,
    "nnunetv2.training.nnUNetTrainer": stock_trainer.nnUNetTrainer,
}
PROMISED = {
    *(f"nnsslPlannerPrimus{size}" for size in ("Tiny", "S", "B", "M", "L")),
    *(f"nnsslPlannerResEnc{size}" for size in ("Tiny", "M", "L", "XL")),
    "nnsslFinetuneTrainer",
}


def test_every_promised_class_is_registered():
    assert {name for _, name in registry()} >= PROMISED


@pytest.mark.parametrize(("key", "target"), registry().items(), ids=lambda value: value[1] if len(value) == 2 else "")
def test_each_entry_is_the_kind_of_class_nnunet_asks_for(key, target):
    module, name = target.split(":")
    found = getattr(import_module(module), name)
    assert found.__module__ == module
    assert issubclass(found, EXPECTED[key[0]])


def test_no_class_of_ours_is_missed():
    present = set()
    for room in ROOMS:
        for found in pkgutil.iter_modules(import_module(room).__path__, f"{room}."):
            for name, value in vars(import_module(found.name)).items():
                if isinstance(value, type) and value.__module__ == found.name and issubclass(value, (*_stock(),)):
                    present.add(f"{found.name}:{name}")
    assert {target for target in present if target.split(":")[1].startswith("nnssl")} == set(registry().values())


def _stock() -> list[type]:
    flat: list[type] = []
    for kinds in EXPECTED.values():
        flat.extend(kinds if isinstance(kinds, tuple) else [kinds])
    return flat
