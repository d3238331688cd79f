"""Checkpoints of ours through readers that are not ours: PyPI nnU-Net's loader, and the rules of nnssl's readers."""

from __future__ import annotations

import io

import pytest
import torch
from checkpoint_helpers import content_of, plans_of, primus, resenc
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from nnssl_ext.checkpoints.aliases import alias_groups, keys_outside
from nnssl_ext.checkpoints.io import load_checkpoint, save_checkpoint
from nnssl_ext.checkpoints.schema import check, kind_of
from nnssl_ext.errors import NnsslError
from nnssl_ext.networks.build import build_backbone


def stock_network(architecture, channels=1, classes=4, deep_supervision=True):
    """As nnU-Net's trainer builds it."""
    return get_network_from_plans(
        architecture["network_class_name"],
        architecture["arch_kwargs"],
        architecture["_kw_requires_import"],
        channels,
        classes,
        deep_supervision=deep_supervision,
    )


def encoder_output(network, image):
    """Encoder features computed by the network's own modules, without our backbones."""
    with torch.no_grad():
        network.eval()
        if hasattr(network, "encoder"):
            return network.encoder(image)
        grid = network.token_grid(image.shape[2:])
        return [network.encode(network.embed(image) + network.positions(grid), grid)[1]]


@pytest.mark.parametrize("architecture", [primus([16, 24, 16]), resenc()], ids=["primus", "resenc"])
def test_the_stock_loader_fills_a_network_of_other_classes(tmp_path, architecture):
    """Compared by encoder output after loading: a stale ``decoder.encoder`` alias would silently undo the encoder."""
    plans = plans_of(architecture, [16, 24, 16])
    torch.manual_seed(0)
    content = content_of(plans, seed=7)
    save_checkpoint(tmp_path / "checkpoint_final.pth", content)

    torch.manual_seed(1)
    network = stock_network(architecture, classes=4)
    image = torch.randn(2, 1, 16, 24, 16)
    reference = build_backbone(plans, "3d_fullres", 1).network
    reference.load_state_dict(content["network_weights"])
    wanted = encoder_output(reference, image)
    assert not torch.allclose(encoder_output(network, image)[-1], wanted[-1], atol=0.1)

    load_pretrained_weights(network, str(tmp_path / "checkpoint_final.pth"))

    for loaded, pretrained in zip(encoder_output(network, image), wanted, strict=True):
        assert torch.equal(loaded, pretrained)


def test_a_stale_alias_would_be_caught():
    """The trap that the test above guards against is real: this file loads without a word and leaves a random encoder."""
    plans = plans_of(resenc(), [16] * 3)
    content = content_of(plans, seed=7)
    fresh = stock_network(resenc(), classes=2).state_dict()
    trap = fresh | {k: v for k, v in content["network_weights"].items() if k.startswith("encoder.")}
    file = io.BytesIO()
    torch.save({"network_weights": trap}, file)
    file.seek(0)
    network = stock_network(resenc(), classes=2)
    load_pretrained_weights(network, file)
    loaded = network.state_dict()["encoder.stem.convs.0.conv.weight"]
    assert not torch.equal(loaded, content["network_weights"]["encoder.stem.convs.0.conv.weight"])


@pytest.mark.parametrize("architecture", [primus([16] * 3), resenc()], ids=["primus", "resenc"])
def test_the_file_is_plain_complete_and_shares_its_aliases(tmp_path, architecture):
    content = content_of(plans_of(architecture, [16] * 3))
    save_checkpoint(tmp_path / "checkpoint_final.pth", content)
    loaded = torch.load(tmp_path / "checkpoint_final.pth", weights_only=True)  # no map_location, as stock nnU-Net does
    check(loaded, "file")
    assert kind_of(loaded, "file") == "nnssl_ext"
    assert all(value.device.type == "cpu" for value in loaded["network_weights"].values())
    assert set(loaded["network_weights"]) == set(stock_network(architecture).state_dict())
    live = build_backbone(plans_of(architecture, [16] * 3), "3d_fullres", 1).network.state_dict()
    assert alias_groups(loaded["network_weights"]) == alias_groups(live)
    assert load_checkpoint(tmp_path / "checkpoint_final.pth").keys() == loaded.keys()


def test_the_plan_has_every_key_that_nnssls_readers_need():
    """The table of required keys, from nnU-Net's development version; types as they index them."""
    plans = plans_of(resenc(), [16, 24, 16])
    plan = content_of(plans)["nnssl_adaptation_plan"]
    assert set(plan["architecture_plans"]) == {"arch_class_name", "arch_kwargs", "arch_kwargs_requiring_import"}
    assert plan["architecture_plans"]["arch_class_name"].endswith("ResidualEncoderUNet")
    assert plan["architecture_plans"]["arch_kwargs_requiring_import"] == ["conv_op", "norm_op", "dropout_op", "nonlin"]
    first = next(iter(plan["pretrain_plan"]["configurations"].values()))
    assert first["spacing"] == [1.0, 1.0, 1.0] and first["patch_size"] == [16, 24, 16]
    assert plan["recommended_downstream_patchsize"] == [16, 24, 16] and plan["pretrain_num_input_channels"] == 1
    assert (plan["key_to_encoder"], plan["key_to_stem"], plan["key_to_lpe"]) == ("encoder.stages", "encoder.stem", None)
    assert plan["keys_to_in_proj"] == ["encoder.stem.convs.0.conv", "encoder.stem.convs.0.all_modules.0"]
    assert plan["architecture_kwargs"] == {"n_stages": 3, "kernel_sizes": [[3, 3, 3]] * 3}


def read_strictly(content, network):
    """nnssl's first reader by its rule: strip the prefix of encoder and stem, load each with ``strict=True``."""
    plan, weights = content["nnssl_adaptation_plan"], content["network_weights"]
    for theirs, ours in ((plan["key_to_encoder"], network.key_to_encoder), (plan["key_to_stem"], network.key_to_stem)):
        part = {k[len(theirs) + 1 :]: v for k, v in weights.items() if k.startswith(theirs)}
        network.get_submodule(ours).load_state_dict(part, strict=True)
    for layer in plan["keys_to_in_proj"]:
        assert f"{layer}.weight" in weights


def test_nnssls_strict_reader_fills_dnas_resenc():
    content = content_of(plans_of(resenc(), [16] * 3), seed=3)
    network = stock_network(resenc())
    read_strictly(content, network)
    reference = stock_network(resenc(), classes=2)
    reference.load_state_dict(content["network_weights"])
    image = torch.randn(1, 1, 16, 16, 16)
    assert all(map(torch.equal, encoder_output(network, image), encoder_output(reference, image)))


def test_nnssls_strict_reader_fills_dnas_primus_and_the_features_agree():
    """Built with the arguments written into the plan; tokens and rotary coordinates are DNA's own."""
    from dynamic_network_architectures.architectures.primus import Primus
    from einops import rearrange

    patch = [16, 24, 8]
    plans = plans_of(primus(patch), patch)
    content = content_of(plans, seed=3)
    written = content["nnssl_adaptation_plan"]["architecture_plans"]
    assert written["arch_class_name"] == "Primus"
    kwargs = written["arch_kwargs"]
    network = Primus(
        1,
        kwargs["embed_dim"],
        kwargs["patch_embed_size"],
        3,
        kwargs["encoder_eva_depth"],
        kwargs["encoder_eva_numheads"],
        patch,
        scale_attn_inner=kwargs["scale_attn_inner"],
        init_values=kwargs["init_values"],
    ).eval()
    read_strictly(content, network)
    reference = build_backbone(plans, "3d_fullres", 1)
    reference.network.load_state_dict(content["network_weights"])
    image = torch.randn(1, 1, *patch)
    with torch.no_grad():
        theirs, _ = network.eva(rearrange(network.down_projection(image), "b c z y x -> b (z y x) c"))
        ours = reference.eval().forward_features(image).levels[0]
    assert torch.allclose(rearrange(ours, "b c z y x -> b (z y x) c"), theirs, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "name"), [({}, "PrimusS"), ({"init_values": None}, "Primus"), ({"eva_depth": 3}, "Primus")]
)
def test_primus_is_written_by_name_only_where_nnunet_would_build_the_same(changes, name):
    from nnssl_ext.checkpoints.adaptation_plan import architecture_plans

    given = primus([64] * 3, strides=3, embed_dim=396, eva_depth=12, eva_numheads=6) | {}
    given["arch_kwargs"] |= changes
    assert architecture_plans(given)["arch_class_name"] == name
    given["arch_kwargs"]["strides"] = given["arch_kwargs"]["strides"][:-1]  # 4-voxel tokens
    assert architecture_plans(given)["arch_class_name"] == "Primus"


def test_a_tensor_counts_as_pretrained_by_any_of_its_names():
    state = content_of(plans_of(resenc(), [16] * 3))["network_weights"]
    outside = keys_outside(state, ("encoder.",))
    assert all(key.startswith(("decoder.stages.", "decoder.transpconvs.", "decoder.seg_layers.")) for key in outside)
    assert not any(key.startswith("decoder.encoder.") for key in outside)


def test_wrong_prefixes_are_a_defect_and_raise():
    plans = plans_of(primus([16] * 3), [16] * 3)
    with pytest.raises(ValueError, match="no weight starts with"):
        content_of(plans, pretrained_prefixes=("encoder.",))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda c: c["nnssl_ext"].pop("plans"), r"lacks 'nnssl_ext\.plans'"),
        (lambda c: c.update(citations="none"), "'citations' is str"),
        (lambda c: c["nnssl_ext"].update(schema=99), "schema 99"),
    ],
)
def test_departures_from_the_schema_are_named(change, named):
    content = content_of(plans_of(primus([16] * 3), [16] * 3))
    change(content)
    with pytest.raises(NnsslError, match=named):
        check(content, "file.pth")


def test_settings_and_plans_become_json_types():
    plans = plans_of(primus([16] * 3), [16] * 3)
    content = content_of(plans, settings={"crop": (16, 16, 16)})
    assert content["nnssl_ext"]["settings"] == {"crop": [16, 16, 16]}
