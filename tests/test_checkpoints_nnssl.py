"""Checkpoints of nnssl's schema, around networks of DNA's with random weights: the encoder's function must survive."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoint_helpers import DATASET_JSON, nnssl_checkpoint, plans_of, primus, resenc, shake
from dynamic_network_architectures.architectures.primus import Primus
from einops import rearrange

from nnssl_ext.checkpoints.adapt import adapt, read_pretrained
from nnssl_ext.checkpoints.io import save_checkpoint
from nnssl_ext.checkpoints.nnssl_format import executed_names, from_nnssl
from nnssl_ext.errors import NnsslError
from nnssl_ext.networks.build import build_backbone, build_network

PATCH = [16, 16, 24]
PRIMUS_KWARGS = {
    "embed_dim": 36,
    "patch_embed_size": [8, 8, 8],
    "encoder_eva_depth": 2,
    "encoder_eva_numheads": 2,
    "scale_attn_inner": True,
    "init_values": 0.1,
}
TARGET = primus(PATCH, strides=3)


def dna_primus(patch=PATCH):
    network = Primus(1, 36, (8, 8, 8), 1, 2, 2, tuple(patch), init_values=0.1, scale_attn_inner=True)
    shake(network)
    return network.eval()


def dna_features(network, image, order="z y x"):
    """Encoder features of DNA's Primus; nnssl's MAE flattens in another order."""
    with torch.no_grad():
        tokens = network.down_projection(image)
        z, y, x = tokens.shape[2:]
        encoded, _ = network.eva(rearrange(tokens, f"b c z y x -> b ({order}) c"))
    return rearrange(encoded, f"b ({order}) c -> b c z y x", z=z, y=y, x=x)


def adapted_features(source, architecture, patch, image):
    plans = plans_of(architecture, patch)
    result = adapt(source, plans, "3d_fullres", DATASET_JSON, "x")
    backbone = build_backbone(plans, "3d_fullres", 1, 3)
    backbone.network.load_state_dict(result.content["network_weights"])
    with torch.no_grad():
        return backbone.eval().forward_features(image).levels, result


def test_a_primus_keeps_its_features():
    network = dna_primus()
    source = from_nnssl(nnssl_checkpoint("Primus", network, PATCH, PRIMUS_KWARGS), "openmind.pth")
    image = torch.randn(1, 1, *PATCH)
    levels, result = adapted_features(source, TARGET, PATCH, image)
    assert torch.allclose(levels[0], dna_features(network, image), atol=1e-5)
    actions = {row.key: row.action for row in result.table.rows}
    assert actions["mask_token"] == actions["decoder.blocks.0.norm1.weight"] == "skipped"
    assert all(actions[key] == "loaded" for key in actions if key.startswith(("eva.", "down_projection.")))
    assert all(actions[key] == "new" for key in actions if key.startswith("decoder.stages."))


def test_a_resenc_keeps_encoder_and_decoder():
    architecture = resenc()
    network = build_network(plans_of(architecture, PATCH), "3d_fullres", 1, 1)
    shake(network)
    given = nnssl_checkpoint("ResidualEncoderUNet", network, PATCH, architecture["arch_kwargs"])
    image = torch.randn(1, 1, *PATCH)
    levels, result = adapted_features(from_nnssl(given, "openmind.pth"), architecture, PATCH, image)
    with torch.no_grad():
        assert all(map(torch.equal, levels, network.eval().encoder(image)))
    assert {row.action for row in result.table.rows if ".seg_layers." not in row.key} == {"loaded"}


@pytest.mark.parametrize(("theirs", "ours"), [("encoder.eva", "eva"), ("eva", "eva")])
def test_the_plans_prefixes_are_followed(theirs, ours):
    """nnssl's contrastive trainers wrap the encoder once more."""
    network = dna_primus()
    content = nnssl_checkpoint("Primus", network, PATCH, PRIMUS_KWARGS)
    content["nnssl_adaptation_plan"]["key_to_encoder"] = theirs
    content["network_weights"] = {
        theirs + key.removeprefix("eva") if key.startswith("eva.") else key: value
        for key, value in content["network_weights"].items()
    }
    assert f"{ours}.pos_embed" in from_nnssl(content, "voco.pth").weights


def test_a_wrong_prefix_is_named_instead_of_training_from_scratch():
    content = nnssl_checkpoint("Primus", dna_primus(), PATCH, PRIMUS_KWARGS)
    content["nnssl_adaptation_plan"]["key_to_encoder"] = "backbone"
    with pytest.raises(NnsslError, match=r"openmind\.pth: no weight starts with 'backbone'"):
        from_nnssl(content, "openmind.pth")


def test_sparks_stale_weights_are_replaced_by_the_executed_ones():
    architecture = resenc()
    network = build_network(plans_of(architecture, PATCH), "3d_fullres", 1, 1)
    shake(network)
    given = nnssl_checkpoint("ResidualEncoderUNet", network, PATCH, architecture["arch_kwargs"])
    stale = 0
    for key, value in given["network_weights"].items():
        if key.startswith("encoder.") and key.endswith(".conv.weight"):
            value.zero_()  # under all_modules.0 the trained values stay, as SparK leaves them
            stale += 1
    source = from_nnssl(given, "spark.pth")
    assert any(f"{stale} convolutions had stale values" in note for note in source.notes)
    image = torch.randn(1, 1, *PATCH)
    levels, _ = adapted_features(source, architecture, PATCH, image)
    with torch.no_grad():
        assert all(map(torch.equal, levels, network.eval().encoder(image)))


def test_intact_weights_are_not_called_stale():
    network = build_network(plans_of(resenc(), PATCH), "3d_fullres", 1, 1)
    weights, stale = executed_names(network.state_dict())
    assert stale == 0 and all(torch.equal(weights[key], value) for key, value in network.state_dict().items())


def test_a_file_without_plan_is_taken_for_a_resencl():
    content = nnssl_checkpoint("ResEncL", build_network(plans_of(resenc(), PATCH), "3d_fullres", 1, 1), PATCH)
    del content["nnssl_adaptation_plan"]
    source = from_nnssl(content, "spark.pth")
    assert source.architecture["arch_kwargs"]["n_stages"] == 6 and "no adaptation plan" in source.notes[0]


def test_nnssls_axis_defect_is_undone_exactly():
    """The network as nnssl trained it, tokens in (y, z, x) order, against ours in C order, on an anisotropic image."""
    network = dna_primus()
    content = nnssl_checkpoint("Primus", network, PATCH, PRIMUS_KWARGS)
    image = torch.randn(1, 1, *PATCH)
    trained = dna_features(network, image, order="y z x")
    fixed, _ = adapted_features(from_nnssl(content, "mae.pth", fix_axes=True), TARGET, PATCH, image)
    plain, _ = adapted_features(from_nnssl(content, "mae.pth"), TARGET, PATCH, image)
    assert torch.allclose(fixed[0], trained, atol=1e-5)
    assert not torch.allclose(plain[0], trained, atol=1e-2)


def test_the_axis_fix_is_refused_where_it_does_not_apply():
    patch = [8, 16, 16]
    content = nnssl_checkpoint("Primus", dna_primus(patch), patch, PRIMUS_KWARGS)
    with pytest.raises(NnsslError, match=r"first two edges of the patch are equal, here \(8, 16, 16\)"):
        from_nnssl(content, "mae.pth", fix_axes=True)
    unet = build_network(plans_of(resenc(), PATCH), "3d_fullres", 1, 1)
    content = nnssl_checkpoint("ResidualEncoderUNet", unet, PATCH, resenc()["arch_kwargs"])
    with pytest.raises(NnsslError, match="no token positions"):
        from_nnssl(content, "mae.pth", fix_axes=True)


def test_unknown_architectures_get_the_nearest_name():
    content = nnssl_checkpoint("Primus", dna_primus(), PATCH, PRIMUS_KWARGS)
    content["nnssl_adaptation_plan"]["architecture_plans"]["arch_class_name"] = "PrimusXM"
    with pytest.raises(NnsslError, match=r"unknown architecture in mae\.pth: 'PrimusXM'") as refused:
        from_nnssl(content, "mae.pth")
    assert "PrimusM" in refused.value.fix


def test_patients_of_the_pretraining_are_not_passed_on(tmp_path):
    content = nnssl_checkpoint("Primus", dna_primus(), PATCH, PRIMUS_KWARGS)
    save_checkpoint(tmp_path / "openmind.pth", content)
    source = read_pretrained(tmp_path / "openmind.pth")
    result = adapt(source, plans_of(TARGET, PATCH), "3d_fullres", DATASET_JSON, "x")
    rest = {key: value for key, value in result.content.items() if key != "network_weights"}
    assert "sub-SECRET" not in json.dumps(rest) and rest["citations"] == content["citations"]


def test_a_model_that_nnunet_trained_is_no_source(tmp_path):
    save_checkpoint(
        tmp_path / "c.pth", {"network_weights": {}, "init_args": {"plans": {}}, "trainer_name": "nnUNetTrainer"}
    )
    with pytest.raises(NnsslError, match=r"c\.pth is a segmentation model that nnU-Net trained"):
        read_pretrained(tmp_path / "c.pth")
    save_checkpoint(tmp_path / "d.pth", {"state_dict": {}})
    with pytest.raises(NnsslError, match=r"d\.pth is no checkpoint .*state_dict"):
        read_pretrained(tmp_path / "d.pth")
