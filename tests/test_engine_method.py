"""Starting from the weights of another run: what is taken along, what is resized, what begins anew."""

import json
from dataclasses import replace

import pytest
import torch
from tiny_dataset import BACKBONES, CONFIGURATION, job_of, log_of, plans_of, weights_of, write_dataset

from nnssl_ext.checkpoints.io import load_checkpoint
from nnssl_ext.checkpoints.tensors import interpolate_positions, resize_token_kernel
from nnssl_ext.engine import loop
from nnssl_ext.engine.job import Job, prepare
from nnssl_ext.engine.method import TEACHER, begin
from nnssl_ext.errors import NnsslError
from nnssl_ext.files import read_json, write_json
from nnssl_ext.networks.build import build_network
from nnssl_ext.networks.segmentation_layer import segmentation_layer

SHORT = ("--epochs", "1", "--iterations", "2")


@pytest.fixture
def dataset(nnunet_env):
    return write_dataset(nnunet_env.preprocessed)


def write_plans(dataset, name: str, preset: str, crop: tuple[int, int, int], **kwargs) -> None:
    """Plans of the same data with another crop and, for a Primus, other arguments."""
    plans = json.loads((dataset / f"nnssl{preset}Plans.json").read_text())
    plans["plans_name"] = name
    found = plans["configurations"][CONFIGURATION]
    found["patch_size"] = found["nnssl"]["global_crop"] = list(crop)
    found["architecture"]["arch_kwargs"] |= kwargs
    (dataset / f"{name}.json").write_text(json.dumps(plans))


def write_labels(dataset, labels: dict) -> None:
    write_json(dataset / "dataset.json", {**read_json(dataset / "dataset.json"), "labels": labels})


def trained(method: str, backbone: str = "PrimusTiny") -> Job:
    job = job_of(*SHORT, method=method, backbone=backbone)
    assert loop.pretrain(job)
    return job


def test_the_latest_checkpoint_gives_everything_and_the_final_one_the_network(dataset):
    first = trained("MAETrainer")
    latest, final = first.output / "checkpoint_latest.pth", first.output / "checkpoint_final.pth"
    same = begin(job_of("-pretrained_weights", str(latest), "--name", "second"))
    state = load_checkpoint(latest)["resume"]["method"]
    mine = same.method.state_dict()
    heads = [key for key in mine if ".seg_layers." not in key and ".decoder.stages." not in key]
    assert any("reconstruct.decoder" in key for key in heads) and "backbone.mask_token" in heads
    for key in heads:
        assert torch.equal(mine[key], state[key]), key
    network_only = begin(job_of("-pretrained_weights", str(final), "--name", "third"))
    decoder = {row.action for row in network_only.table.rows if row.key.startswith("reconstruct.decoder")}
    assert decoder == {"new"}
    assert torch.equal(
        network_only.method.backbone.network.eva.blocks[0].attn.q_proj.weight,
        state["backbone.network.eva.blocks.0.attn.q_proj.weight"],
    )


def test_larger_crops_and_smaller_tokens_resize_the_weights_and_restart_the_schedules(dataset):
    first = trained("MAETrainer")
    write_plans(
        dataset, "nnsslHiresPlans", "PrimusTiny", (16, 24, 16), input_shape=(16, 24, 16), strides=[[1] * 3, [2] * 3]
    )
    weights = weights_of(first)
    flags = ("-p", "nnsslHiresPlans", "-pretrained_weights", str(first.output / "checkpoint_latest.pth"))
    job = job_of(*SHORT, *flags, "--name", "hires", "--optim.lr", "1e-12", "--optim.warmup", "0")
    assert job.output.name == "MAETrainer__nnsslHiresPlans__3d_fullres__hires"
    assert loop.pretrain(job)
    now = weights_of(job)
    kernel = resize_token_kernel(weights["down_projection.proj.weight"], (2, 2, 2))
    positions = interpolate_positions(weights["eva.pos_embed"], (4, 4, 4), (8, 12, 8))
    for name, wanted in {
        "down_projection.proj.weight": kernel,
        "eva.pos_embed": positions,
        "eva.blocks.1.mlp.fc1_g.weight": weights["eva.blocks.1.mlp.fc1_g.weight"],
    }.items():
        torch.testing.assert_close(now[name], wanted, rtol=0, atol=1e-6)
    assert [float(row["step"]) for row in log_of(job)] == [2]
    content = load_checkpoint(job.output / "checkpoint_final.pth")
    assert content["nnssl_ext"]["adapted_from"]["method"] == "MAETrainer"
    assert str(first.output) not in str(content["nnssl_ext"])  # checkpoints travel, paths do not
    rows = {row["key"]: row for row in json.loads((job.output / "transfer.json").read_text())["rows"]}
    assert rows["down_projection.proj.weight"]["action"] == rows["eva.pos_embed"]["action"] == "adapted"
    assert rows["decoder.stages.0.0.weight"]["action"] == "new"
    assert rows["reconstruct.decoder.project_in.weight"]["action"] == "loaded"
    assert rows["reconstruct.decoder.project_out.weight"]["action"] == "new"  # as many voxels as a token has


def test_a_run_from_other_weights_continues_without_them(dataset):
    first = trained("MAETrainer", "ResEncTiny")
    copy = first.output.parent / "elsewhere.pth"
    copy.write_bytes((first.output / "checkpoint_final.pth").read_bytes())
    flags = ("-pretrained_weights", str(copy), "--name", "second")
    job = job_of(*SHORT, *flags, backbone="ResEncTiny")
    assert loop.pretrain(job)
    copy.unlink()
    assert loop.pretrain(job, resume=True)
    assert load_checkpoint(job.output / "checkpoint_final.pth")["nnssl_ext"]["adapted_from"]["file"] == "elsewhere.pth"
    with pytest.raises(NnsslError, match="pretrained_weights"):
        loop.pretrain(replace(job, run=replace(job.run, pretrained_weights=None)), resume=True)


def test_weights_of_another_method_or_network(dataset):
    first = trained("SimSiamTrainer")
    path = str(first.output / "checkpoint_latest.pth")
    other = begin(job_of("-pretrained_weights", path, "--name", "from_simsiam"))
    assert {row.action for row in other.table.rows if row.key.startswith("reconstruct.")} == {"new"}
    assert torch.equal(
        other.method.backbone.network.state_dict()["eva.blocks.0.attn.q_proj.weight"],
        weights_of(first)["eva.blocks.0.attn.q_proj.weight"],
    )
    with pytest.raises(NnsslError, match="holds a SegmentationPrimus, plans nnsslResEncTinyPlans build"):
        begin(job_of("-pretrained_weights", path, backbone="ResEncTiny"))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_registration_goes_on_from_a_model_that_nnunet_trained(dataset, tmp_path, backbone):
    plans = plans_of(backbone)
    torch.manual_seed(5)
    trained = build_network(plans, CONFIGURATION, 1, 3).state_dict()
    arguments = {"plans": plans, "configuration": CONFIGURATION, "dataset_json": {}}
    path = tmp_path / "nnunet.pth"
    torch.save({"network_weights": trained, "init_args": arguments, "trainer_name": "nnUNetTrainer"}, path)
    flags = ("-pretrained_weights", str(path), "--seed", "1")
    started = begin(job_of(*flags, "--labels", "1", "2", method="RegistrationTrainer", backbone=backbone))
    network, table = started.method.backbone.network, started.table
    prefix, _ = segmentation_layer(network)
    mine = network.state_dict()
    for key, value in trained.items():
        if prefix in key or ".seg_layers." not in key:
            assert torch.equal(mine[key], value), key
    assert {row.action for row in table.rows if row.key.startswith(prefix)} == {"loaded"}
    assert {row.action for row in table.rows if ".seg_layers." not in row.key and "mask_token" not in row.key} == {
        "loaded"
    }
    assert (started.origin["kind"], started.origin["method"]) == ("nnunet", "nnUNetTrainer")
    other = begin(job_of(*flags, "--labels", "1", method="RegistrationTrainer", backbone=backbone))
    layer = [row for row in other.table.rows if row.key.startswith(prefix)]
    assert {(row.action, row.why) for row in layer} == {("new", "the checkpoint tells no 2 labels")}
    assert other.method.backbone.network.state_dict()[f"{prefix}bias"].shape == (2,)


def test_labels_that_the_dataset_does_not_have_are_refused_before_training(dataset):
    job = job_of("--labels", "1", "7", method="RegistrationTrainer")
    write_labels(dataset, {"background": 0, "all": [1, 2], "core": [2], "ignore": 3})
    with pytest.raises(NnsslError, match=r"unknown label 7 in Dataset901_Tiny\n  -> known: 1 all, 2 all/core$"):
        prepare(job, False, 1)
    write_labels(dataset, {"background": 0, "foreground": 1})
    with pytest.raises(NnsslError, match="has no labels to learn from"):
        prepare(job, False, 1)
    assert not job.output.exists()


def test_the_layer_that_tells_labels_is_taken_over_from_our_runs_that_trained_it(dataset):
    def from_checkpoint(job, *labels):
        weights = str(job.output / "checkpoint_final.pth")
        flags = ("--labels", *labels, "-pretrained_weights", weights, "--name", "b", "--seed", "1")
        started = begin(job_of(*flags, method="RegistrationTrainer"))
        prefix, layer = segmentation_layer(started.method.backbone.network)
        return (
            layer.weight,
            weights_of(job)[f"{prefix}weight"],
            {row.action for row in started.table.rows if row.key.startswith(prefix)},
        )

    write_labels(dataset, {"background": 0, "bright": 1, "brighter": 2})
    job = job_of(*SHORT, "--labels", "1", "2", method="RegistrationTrainer")
    assert loop.pretrain(job)
    mine, others, actions = from_checkpoint(job, "1", "2")
    assert torch.equal(mine, others) and actions == {"loaded"}
    mine, others, actions = from_checkpoint(trained("MAETrainer"), "1")  # of the right shape, but never trained
    assert mine.shape == others.shape and not torch.equal(mine, others) and actions == {"new"}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_student_and_teacher_start_as_the_other_runs_teacher(dataset, backbone):
    first = trained("DINO3DTrainer", backbone)
    latest = first.output / "checkpoint_latest.pth"
    state = load_checkpoint(latest)["resume"]["method"]
    assert not torch.equal(state["teacher.parts.head.mlp.0.weight"], state["head.mlp.0.weight"])  # they had parted
    started = begin(job_of("-pretrained_weights", str(latest), method="DINO3DTrainer", backbone=backbone))
    mine = started.method.state_dict()
    teacher = {key.removeprefix(TEACHER): value for key, value in mine.items() if key.startswith(TEACHER)}
    assert any(key.startswith("patch_head.") for key in teacher)
    for key, value in teacher.items():
        assert torch.equal(mine[key], value), key
        if ".seg_layers." not in key and ".decoder." not in key:
            assert torch.equal(state[TEACHER + key], value), key
    assert mine[key].data_ptr() != value.data_ptr()
    assert torch.equal(mine["crop_targets.centre"], state["crop_targets.centre"])


def test_names_that_are_no_folder_names_are_refused(dataset):
    with pytest.raises(NnsslError, match="cannot be part of a folder name"):
        job_of("--name", "a/b")
