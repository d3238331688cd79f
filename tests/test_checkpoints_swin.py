"""Checkpoints of Swin UNETR: adapted to other data, read by stock nnU-Net, fine-tuned in its halves."""

import pytest
import torch
from checkpoint_helpers import DATASET_JSON, content_of, plans_of, swin
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from nnssl_ext.checkpoints.adapt import adapt
from nnssl_ext.checkpoints.io import save_checkpoint
from nnssl_ext.checkpoints.pretrained import from_ours
from nnssl_ext.checkpoints.target import fit_patch
from nnssl_ext.errors import NnsslError
from nnssl_ext.networks.build import build_backbone
from nnssl_ext.trainers.finetuning.groups import half_of, parameter_groups
from nnssl_ext.trainers.finetuning.settings import read_settings

PATCH = [64, 32, 32]


def decoded(network, image):
    network.eval()
    with torch.no_grad():
        return network.decoder.maps(network.encode(image))


def test_the_stock_loader_fills_a_network_of_other_classes(tmp_path):
    architecture = swin()
    plans = plans_of(architecture, PATCH)
    content = content_of(plans, seed=7)
    save_checkpoint(tmp_path / "checkpoint_final.pth", content)
    parts = architecture["network_class_name"], architecture["arch_kwargs"], architecture["_kw_requires_import"]
    torch.manual_seed(1)
    network = get_network_from_plans(*parts, 1, 4, deep_supervision=True)
    load_pretrained_weights(network, str(tmp_path / "checkpoint_final.pth"))
    reference = build_backbone(plans, "3d_fullres", 1).network
    reference.load_state_dict(content["network_weights"])
    image = torch.randn(1, 1, *PATCH)
    for ours, stock in zip(decoded(reference, image), decoded(network, image), strict=True):
        assert torch.equal(ours, stock)


@pytest.mark.parametrize("channels", [1, 2])
def test_adapted_to_other_classes_and_channels_it_answers_a_repeated_scan_alike(channels):
    plans = plans_of(swin(), PATCH)
    content = content_of(plans)
    dataset_json = {**DATASET_JSON, "channel_names": {str(i): "MRI" for i in range(channels)}}
    result = adapt(from_ours(content, "source.pth"), plans, "3d_fullres", dataset_json, "nnsslTestPlans_x")
    before, after = (
        build_backbone(plans, "3d_fullres", 1).network,
        build_backbone(plans, "3d_fullres", channels, 3).network,
    )
    before.load_state_dict(content["network_weights"])
    after.load_state_dict(result.content["network_weights"])
    scan = torch.randn(1, 1, *PATCH)
    for old, new in zip(decoded(before, scan), decoded(after, scan.expand(-1, channels, -1, -1, -1)), strict=True):
        torch.testing.assert_close(old, new, atol=1e-3, rtol=1e-3)
    counts = result.table.counts()
    assert counts["adapted"] == (3 if channels == 2 else 0)  # patch embedding, and the image's skip with its shortcut
    assert all(".seg_layers." in key for key in result.table.keys("new"))
    cited = {entry["type"]: entry["apa_citations"] for entry in content["citations"]}
    assert "Swin UNETR" in cited["Architecture"][0]


def test_what_does_not_fit_is_refused_by_name():
    content = content_of(plans_of(swin(), PATCH))
    other = plans_of(swin(window_size=5), PATCH)
    with pytest.raises(NnsslError, match="window_size is 3 in the checkpoint, 5 in the plans"):
        adapt(from_ours(content, "source.pth"), other, "3d_fullres", DATASET_JSON, "x")
    with pytest.raises(NnsslError, match="does not suit"):
        fit_patch(swin(), [48, 64, 64], "source.pth")


def test_fine_tuning_knows_its_halves_and_settings():
    plans = plans_of(swin(), PATCH)
    backbone = build_backbone(plans, "3d_fullres", 1)
    settings = read_settings(plans, "3d_fullres")
    assert (settings.optimizer, settings.lr_encoder, settings.weight_decay) == ("adamw", 1e-3, 1e-5)  # the thesis
    for name in backbone.network.state_dict():
        wanted = "encoder" if name.startswith(backbone.encoder_prefixes) else "decoder"
        assert half_of(name) == ("head" if ".seg_layers." in name else wanted)
    groups = parameter_groups(backbone.network, settings)
    assert sum(len(group["params"]) for group in groups) == len(list(backbone.network.parameters()))
