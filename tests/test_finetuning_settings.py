"""Fine-tuning settings from plans, and the subset of training cases."""

import json
from dataclasses import asdict

import pytest

from nnssl_ext.errors import NnsslError
from nnssl_ext.trainers.finetuning.settings import FinetuneSettings, default_settings, read_settings
from nnssl_ext.trainers.finetuning.subset import training_subset

RESENC = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
PRIMUS = "nnssl_ext.networks.primus.SegmentationPrimus"


def plans(network: str, preset: str = "", **block: object) -> dict:
    configuration = {"architecture": {"network_class_name": network}, "patch_size": [16, 16, 16]}
    if preset:
        configuration["nnssl"] = {"preset": preset}
    return {"plans_name": "P", "configurations": {"3d_fullres": configuration}, "nnssl_finetuning": block}


def test_published_values_per_backbone() -> None:
    resenc, primus = read_settings(plans(RESENC), "3d_fullres"), read_settings(plans(PRIMUS), "3d_fullres")
    assert (resenc.optimizer, resenc.lr_encoder, resenc.lr_scratch, resenc.weight_decay) == ("sgd", 1e-3, 1e-2, 3e-5)
    assert (primus.optimizer, primus.lr_encoder, primus.lr_scratch, primus.weight_decay) == ("adamw", 1e-4, 3e-4, 5e-2)
    assert (resenc.total_iterations, resenc.warmup_share) == (150 * 250, 15 / 150)
    assert (primus.gradient_clip, resenc.gradient_clip) == (1, 12)


def test_small_presets_train_in_few_iterations_with_adamw() -> None:
    for network, preset in ((RESENC, "ResEncTiny"), (PRIMUS, "PrimusTiny")):
        settings = read_settings(plans(network, preset), "3d_fullres")
        assert settings.optimizer == "adamw" and not settings.mirroring and settings.total_iterations <= 500


def test_the_block_survives_json_and_may_name_any_subset_of_the_fields() -> None:
    full = default_settings("primus")
    back = read_settings(plans(PRIMUS, **json.loads(json.dumps(asdict(full)))), "3d_fullres")
    assert back == full
    assert read_settings(plans(PRIMUS, epochs=3, lr_decoder=1), "3d_fullres").lr_decoder == 1.0


@pytest.mark.parametrize(
    ("block", "named"),
    [
        ({"lr_encodr": 1e-3}, "lr_encoder"),
        ({"schedule": "sawtoth"}, "sawtooth"),
        ({"epochs": "150"}, "epochs"),
        ({"epochs": True}, "epochs"),
        ({"betas": [0.9]}, "betas"),
        ({"warmup_share": 1.5}, "warmup_share"),
        ({"freeze_share": 0.95, "schedule": "sawtooth"}, "freeze_share"),
        ({"momentum": 1.5}, "momentum"),
        ({"betas": [1.5, 0.9]}, "betas"),
        ({"seed": -1}, "seed"),
        ({"train_cases": 0}, "train_cases"),
        ({"gradient_clip": 20.0}, "gradient_clip"),
    ],
)
def test_wrong_settings_are_named(block: dict, named: str) -> None:
    with pytest.raises(NnsslError, match=named):
        read_settings(plans(RESENC, **block), "3d_fullres")


def test_settings_say_where_every_field_comes_from() -> None:
    documented = FinetuneSettings.__doc__ or ""
    assert [name for name in asdict(FinetuneSettings()) if f"{name}:" not in documented.replace(",", ":")] == []


def test_subsets_are_nested_seeded_and_independent_of_the_order_given() -> None:
    cases = [f"case_{i:03d}" for i in range(30)]
    large = training_subset(cases, 20, seed=3)
    for count in (1, 2, 5, 19):
        assert training_subset(cases[::-1], count, seed=3) == large[:count]
    assert len(set(large)) == 20 and set(large) <= set(cases)
    assert training_subset(cases, 5, seed=4) != large[:5]


def test_too_large_a_subset_is_refused_with_both_numbers() -> None:
    with pytest.raises(NnsslError, match=r"train_cases is 5.*3 training cases"):
        training_subset(["a", "b", "c"], 5, seed=0)
