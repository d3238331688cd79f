"""The exported folder: bit-identical weights in both files, a card that reads, nothing private, nothing executable, and hashes."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from checkpoint_helpers import DATASET_JSON, content_of, nnssl_checkpoint, plans_of, primus, resenc
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from safetensors import safe_open
from safetensors.torch import load_model, save_file

from nnssl_ext.checkpoints.adapt import adapt, read_pretrained
from nnssl_ext.checkpoints.aliases import alias_groups
from nnssl_ext.checkpoints.export import FILES, HASHED, export
from nnssl_ext.checkpoints.io import load_checkpoint, save_checkpoint
from nnssl_ext.checkpoints.source import name_of, with_local_files
from nnssl_ext.errors import NnsslError
from nnssl_ext.files import read_json
from nnssl_ext.networks.build import build_network
from nnssl_ext.plans import FINETUNING

PATCH = [16, 24, 16]


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.fixture(params=["primus", "resenc"])
def exported(request, tmp_path):
    """A resumable checkpoint of a run, and the folder made of it."""
    plans = plans_of({"primus": primus(PATCH), "resenc": resenc()}[request.param], PATCH)
    content = content_of(plans, seed=7)
    key = next(name for name in content["network_weights"] if name.endswith(".bias"))
    content["network_weights"][key].view(-1)[:3] = torch.tensor(
        [float("nan"), -0.0, 1e-45]
    )  # bits that == would not see
    content["resume"] = {"optimizer": {"state": {0: torch.ones(3)}}, "state": {"step": 5}, "method": {}}
    save_checkpoint(tmp_path / "checkpoint_latest.pth", content)
    export(tmp_path / "checkpoint_latest.pth", tmp_path / "out", "cc-by-sa-4.0", "someone/some-model")
    return content, tmp_path / "out"


def test_both_files_hold_the_same_bits_names_and_description(exported):
    content, folder = exported
    from_pth = load_checkpoint(folder / "checkpoint_final.pth")
    from_safetensors = load_checkpoint(folder / "model.safetensors")
    given = content["network_weights"]
    for read in (from_pth, from_safetensors):
        weights = read.pop("network_weights")
        assert list(weights) == list(given)
        assert all(bits(weights[name]) == bits(given[name]) for name in given)
        assert all(weights[name].dtype == given[name].dtype for name in given)
        assert alias_groups(weights) == alias_groups(given)
    assert from_pth == from_safetensors
    assert set(from_pth) == {"nnssl_adaptation_plan", "citations", "nnssl_ext"}  # no "resume"
    assert from_pth["nnssl_ext"] == content["nnssl_ext"]


def test_the_folder_is_complete_and_sha256sum_agrees(exported):
    content, folder = exported
    assert {path.name for path in folder.iterdir()} == set(FILES)
    checked = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=folder, capture_output=True, text=True, check=True)
    assert checked.stdout.splitlines() == [f"{name}: OK" for name in HASHED]
    assert read_json(folder / "plans.json") == content["nnssl_ext"]["plans"]
    assert read_json(folder / "adaptation_plan.json") == content["nnssl_adaptation_plan"]
    told = read_json(folder / "config.json")
    assert told["method"] == "MAETrainer" and told["settings"] == {"mask_ratio": 0.75} and not told["resumable"]


def test_the_folder_loads_in_stock_nnunet_and_through_safetensors_alone(exported):
    """The plans of the folder build the network by nnU-Net's own function; a network of other classes, as a stranger has."""
    content, folder = exported
    plans = read_json(folder / "plans.json")
    architecture = plans["configurations"]["3d_fullres"]["architecture"]
    parts = (architecture["network_class_name"], architecture["arch_kwargs"], architecture["_kw_requires_import"])
    network = get_network_from_plans(*parts, 1, 4, deep_supervision=True)
    load_pretrained_weights(network, str(folder / "checkpoint_final.pth"))
    loaded = network.state_dict()
    heads = [name for name in loaded if ".seg_layers." in name]
    assert heads
    for name, value in content["network_weights"].items():
        assert name in heads or bits(loaded[name]) == bits(value)

    other = get_network_from_plans(*parts, 1, 2, deep_supervision=False)
    assert load_model(other, folder / "model.safetensors", strict=True) == (set(), [])
    assert all(bits(value) == bits(content["network_weights"][name]) for name, value in other.state_dict().items())


def test_adapting_the_folder_equals_adapting_the_checkpoint(exported):
    content, folder = exported
    plans = content["nnssl_ext"]["plans"]
    through = [
        adapt(read_pretrained(path), plans, "3d_fullres", DATASET_JSON, "x").content
        for path in (folder, folder.parent / "checkpoint_latest.pth")
    ]
    trained = [name for name in through[0]["network_weights"] if ".seg_layers." not in name]
    assert all(bits(through[0]["network_weights"][n]) == bits(through[1]["network_weights"][n]) for n in trained)


def test_an_adapted_checkpoint_is_exported_with_its_origin(exported, tmp_path):
    """Also one whose papers lack what nnssl's format asks for, as files of others may."""
    content, folder = exported
    source = replace(read_pretrained(folder), citations=[{"bibtex_citations": ["@article{x}"]}])
    plans = {**content["nnssl_ext"]["plans"], FINETUNING: {"epochs": 1, "train_cases": 3}}
    adapted = adapt(source, plans, "3d_fullres", DATASET_JSON, "adaptedPlans")
    save_checkpoint(tmp_path / "adapted.pth", adapted.content)
    export(tmp_path / "adapted.pth", tmp_path / "shared")
    card = (tmp_path / "shared" / "README.md").read_text()
    assert "The weights were taken over from `out` (MAETrainer)." in card and "- @article{x}" in card
    shared = read_json(tmp_path / "shared" / "plans.json")
    assert shared["plans_name"] == "adaptedPlans" and not {FINETUNING, "nnssl_adapted_from"} & shared.keys()
    assert load_checkpoint(tmp_path / "shared")["nnssl_ext"]["plans"] == shared


def test_the_card_reads_as_the_hub_reads_it(exported):
    content, folder = exported
    card = (folder / "README.md").read_text()
    _, front, text = card.split("---\n", 2)
    told = yaml.safe_load(front)
    assert told["license"] == "cc-by-sa-4.0" and told["library_name"] == "nnssl-ext"
    assert told["pipeline_tag"] == "image-feature-extraction" and "mae" in told["tags"]
    from huggingface_hub import ModelCard

    assert ModelCard.load(folder / "README.md").data.to_dict() == told
    assert text.lstrip().startswith("# some-model\n")
    for said in (
        "hf:someone/some-model",
        "Dataset004_Hippocampus",
        "| cases | 200 |",
        '"mask_ratio": 0.75',
        "He, K., et al.",
    ):
        assert said in text
    network = build_network(content["nnssl_ext"]["plans"], "3d_fullres", 1, 2)
    every = sum(p.numel() for p in network.parameters())
    heads = sum(p.numel() for n, p in network.named_parameters() if ".seg_layers." in n)
    assert f"Of its {every:,} parameters, {every - heads:,} are pretrained" in text
    primus_here = "eva.pos_embed" in content["network_weights"]
    assert ("because the plans name its classes" in text) == primus_here
    assert ("-tr nnsslFinetuneTrainer" in text) == primus_here  # SGD at 1e-2 is nothing for a transformer
    assert "No licence was stated" not in text


def test_without_a_licence_the_card_says_so(tmp_path):
    save_checkpoint(tmp_path / "c.pth", content_of(plans_of(primus(PATCH), PATCH)))
    export(tmp_path / "c.pth", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "unknown" and "No licence was stated" in card
    with pytest.raises(NnsslError, match="'Apache 2' is no licence identifier"):
        export(tmp_path / "c.pth", tmp_path / "other", "Apache 2")


@pytest.mark.parametrize("name", ["model.safetensors", "checkpoint_final.pth"])
def test_a_tampered_file_is_named_and_refused(exported, name):
    _, folder = exported
    tampered = bytearray((folder / name).read_bytes())
    tampered[len(tampered) // 2] ^= 1  # one bit of a weight; the file still is whole
    (folder / name).write_bytes(tampered)
    with pytest.raises(NnsslError, match=rf"{name} is not the file that was shared: its SHA-256 differs"):
        load_checkpoint(folder / name)
    (folder / "SHA256SUMS").unlink()
    if name.endswith(".pth"):  # its own sums, of its parts, still give it away
        with pytest.raises(NnsslError, match="differs from its checksum"):
            load_checkpoint(folder / name)
    else:
        load_checkpoint(folder / name)


def test_a_damaged_list_of_sums_is_named(exported):
    _, folder = exported
    (folder / "SHA256SUMS").write_text("cafe  model.safetensors\n")
    with pytest.raises(NnsslError, match=r"SHA256SUMS is damaged: line 1"):
        load_checkpoint(folder)


class Payload:
    """A pickle that would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_with_code_is_refused_whatever_it_is_called(tmp_path):
    for name in ("checkpoint_final.pth", "model.safetensors"):
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        torch.save({"network_weights": {}, "nnssl_ext": Payload(tmp_path / "executed")}, folder / name)
        with pytest.raises(NnsslError, match=name):
            load_checkpoint(folder)
    assert not (tmp_path / "executed").exists()


def test_safetensors_of_somebody_else_are_named(tmp_path):
    save_file({"weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(NnsslError, match="does not say of which network"):
        load_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(NnsslError, match="truncated or damaged"):
        load_checkpoint(tmp_path)


def test_safetensors_hold_each_tensor_once(exported):
    content, folder = exported
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert len(list(file.keys())) == len(alias_groups(content["network_weights"]))


def test_what_cannot_be_exported_is_named(tmp_path):
    network = build_network(plans_of(resenc(), PATCH), "3d_fullres", 1, 1)
    save_checkpoint(
        tmp_path / "c.pth", nnssl_checkpoint("ResidualEncoderUNet", network, PATCH, resenc()["arch_kwargs"])
    )
    with pytest.raises(NnsslError, match=r"c\.pth was not written by nnssl-ext"):
        export(tmp_path / "c.pth", tmp_path / "out")
    save_checkpoint(tmp_path / "ours.pth", content_of(plans_of(resenc(), PATCH)))
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(NnsslError, match="holds something else than an export"):
        export(tmp_path / "ours.pth", tmp_path / "out")
    with pytest.raises(NnsslError, match="holds no checkpoint"):
        load_checkpoint(tmp_path / "out")


def test_exporting_an_export_gives_the_same_folder(exported, tmp_path):
    _, folder = exported
    export(folder, tmp_path / "again", "cc-by-sa-4.0", "someone/some-model")
    for name in ("model.safetensors", "plans.json", "adaptation_plan.json", "config.json", "README.md"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_names_say_no_folders():
    assert name_of(Path("/home/me/run/checkpoint_final.pth")) == "checkpoint_final.pth"
    assert name_of(Path("hf:me/model@v1.0")) == "hf:me/model@v1.0"
    assert with_local_files("mind+last.pth@encoder1") == "mind+last.pth@encoder1"


def test_a_real_run_tells_no_case_and_no_path(nnunet_env, tmp_path):
    """Everything a run writes into its checkpoint, through the export: no case name, no folder of this computer."""
    from tiny_dataset import job_of, write_dataset

    from nnssl_ext.engine.loop import pretrain

    write_dataset(nnunet_env.preprocessed)
    job = job_of("--epochs", "1", "--iterations", "1", "--workers", "0")
    assert pretrain(job)
    export(job.output / "checkpoint_latest.pth", tmp_path / "out")
    weights = {"model.safetensors", "checkpoint_final.pth"}
    texts = [(tmp_path / "out" / name).read_text() for name in set(FILES) - weights]
    texts.append(json.dumps({k: v for k, v in load_checkpoint(tmp_path / "out").items() if k != "network_weights"}))
    for text in texts:
        assert "case_0" not in text and str(tmp_path) not in text and str(Path.home()) + "/" not in text
    assert "| cases | 6 |" in (tmp_path / "out" / "README.md").read_text()
