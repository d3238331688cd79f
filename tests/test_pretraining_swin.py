"""Methods on Swin UNETR, from plans to a network that stock nnU-Net builds and fills."""

import json
from pathlib import Path

import pytest
import torch
from network_plans import swin_plans
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from tiny_dataset import CONFIGURATION, DATASET, plans_of, write_dataset

from nnssl_ext.checkpoints.io import load_checkpoint
from nnssl_ext.cli import train
from nnssl_ext.engine import loop

pytest.importorskip("monai", reason="Swin UNETR needs MONAI (extra: swin)")


def write_plans(base: Path) -> None:
    """Tiny plans whose network is a Swin UNETR; crops of 32 voxels are mostly padding around the tiny cases."""
    plans = plans_of("ResEncTiny") | {"plans_name": "nnsslSwinUNETRPlans"}
    found = plans["configurations"][CONFIGURATION]
    found["architecture"] = swin_plans(drop_path_rate=0.1)["configurations"]["3d_fullres"]["architecture"]
    found["patch_size"] = [64, 32, 32]
    sizes = {"global_crop": [64, 32, 32], "local_crop": [32, 32, 32]}
    found["nnssl"] |= {"backbone": "swin", "preset": "SwinUNETR", **sizes}
    (base / "nnsslSwinUNETRPlans.json").write_text(json.dumps(plans))


@pytest.mark.parametrize(
    "method", ["SimSiamTrainer", "MAETrainer", "DINO3DTrainer", "IBOTTrainer", "DisruptiveAETrainer"]
)
def test_a_pretrained_encoder_reaches_stock_nnunet(nnunet_env, method):
    write_plans(write_dataset(nnunet_env.preprocessed))
    flags = [DATASET, CONFIGURATION, "-tr", method, "-p", "nnsslSwinUNETRPlans", "-device", "cpu"]
    flags += ["--epochs", "1", "--iterations", "2", "--batch_size", "2"]
    if method == "SimSiamTrainer":
        # the cases are smaller than a crop: both views are the whole case
        flags += ["--iou", "1.0", "1.0", "--projector_dim", "32", "--predictor_dim", "8"]
    if method in ("DINO3DTrainer", "IBOTTrainer"):
        flags += [
            "--head.prototypes",
            "64",
            "--head.hidden",
            "32",
            "--head.bottleneck",
            "16",
            "--crops.local_views",
            "2",
        ]
    args, rest = train.parser().parse_known_args(flags)
    job = train._job(args, rest)
    fresh = loop.build_method(job).export_backbone().network.state_dict()
    assert loop.pretrain(job)

    content = load_checkpoint(job.output / "checkpoint_final.pth")
    trained = content["network_weights"]
    moved = {name for name in fresh if not torch.equal(fresh[name], trained[name])}
    assert any(name.startswith("swinViT.layers4.") for name in moved)
    assert set(content["nnssl_ext"]["not_pretrained"]).isdisjoint(moved)
    entry = job.plans["configurations"][CONFIGURATION]["architecture"]
    network = get_network_from_plans(entry["network_class_name"], entry["arch_kwargs"], [], 1, 5, deep_supervision=True)
    load_pretrained_weights(network, str(job.output / "checkpoint_final.pth"))
    state = network.state_dict()
    assert all(torch.equal(state[name], value) for name, value in trained.items() if ".seg_layers." not in name)
    assert network(torch.randn(1, 1, 64, 32, 32))[0].shape == (1, 5, 64, 32, 32)
