"""What becomes of every tensor when the target differs: by function where the encoder must stay equal, by name where not."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoint_helpers import DATASET_JSON, content_of, plans_of, primus, resenc, shake
from torch import nn

from nnssl_ext.checkpoints.adapt import adapt, adapted_name
from nnssl_ext.checkpoints.pretrained import from_ours
from nnssl_ext.checkpoints.schema import check
from nnssl_ext.errors import NnsslError
from nnssl_ext.networks.build import build_backbone

TWO_CHANNELS = {**DATASET_JSON, "channel_names": {"0": "T1", "1": "T2"}}


def adapted_to(source_plans, target_plans, dataset_json=DATASET_JSON, input_channels=1):
    """Adapt a fresh checkpoint; returns the adaptation, and the backbones of checkpoint and target."""
    content = content_of(source_plans, input_channels)
    result = adapt(from_ours(content, "source.pth"), target_plans, "3d_fullres", dataset_json, "nnsslTestPlans_x")
    before = loaded(source_plans, input_channels, 2, content)
    after = loaded(target_plans, len(dataset_json["channel_names"]), 3, result.content)
    return result, before, after


def loaded(plans, channels, classes, content):
    backbone = build_backbone(plans, "3d_fullres", channels, classes)
    backbone.network.load_state_dict(content["network_weights"])
    return backbone.eval()


def features(backbone, image):
    with torch.no_grad():
        return backbone.forward_features(image).levels


@pytest.mark.parametrize("architecture", [primus([16, 24, 16]), resenc()])
def test_same_plans_other_classes_keep_encoder_and_decoder(architecture):
    plans = plans_of(architecture, [16, 24, 16])
    result, before, after = adapted_to(plans, plans)
    image = torch.randn(1, 1, 16, 24, 16)
    for old, new in zip(features(before, image), features(after, image), strict=True):
        assert torch.equal(old, new)
    with torch.no_grad():
        old, new = (b.forward_decoder(b.forward_features(image)).levels for b in (before, after))
    assert all(torch.equal(o, n) for o, n in zip(old, new, strict=True))
    heads = [row for row in result.table.rows if ".seg_layers." in row.key]
    assert heads and all(row.action == "new" and row.target[0] == 3 for row in heads)
    assert {row.action for row in result.table.rows if ".seg_layers." not in row.key} == {"loaded"}
    check(result.content, "adapted")
    assert result.content["nnssl_ext"]["not_pretrained"] == result.table.keys("new")


@pytest.mark.parametrize("architecture", [primus([16, 16, 16]), resenc()])
def test_from_one_to_two_channels_and_back_the_response_to_a_repeated_scan_stays(architecture):
    plans = plans_of(architecture, [16, 16, 16])
    scan = torch.randn(1, 1, 16, 16, 16)
    for old, new in ((1, 2), (2, 1)):
        given = TWO_CHANNELS if new == 2 else DATASET_JSON
        result, before, after = adapted_to(plans, plans, given, input_channels=old)
        pairs = zip(
            features(before, scan.expand(-1, old, -1, -1, -1)),
            features(after, scan.expand(-1, new, -1, -1, -1)),
            strict=True,
        )
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in pairs)
        stem = [row for row in result.table.rows if row.action == "adapted"]
        assert len(stem) == 1 and f"channels {old} -> {new}" in stem[0].why
        assert result.content["nnssl_ext"]["input_channels"] == new


def test_another_patch_interpolates_positions_as_the_network_itself_does():
    """The pretrained network, shown the target's patch, interpolates at run time: both ways must agree."""
    source, target = plans_of(primus([16, 16, 16]), [16] * 3), plans_of(primus([24, 16, 32]), [24, 16, 32])
    result, before, after = adapted_to(source, target)
    image = torch.randn(1, 1, 24, 16, 32)
    assert torch.allclose(features(before, image)[0], features(after, image)[0], atol=1e-5)
    (row,) = [row for row in result.table.rows if row.action == "adapted"]
    assert row.key == "eva.pos_embed" and (row.source, row.target) == ((1, 64, 36), (1, 192, 36))


def test_another_grid_with_as_many_tokens_is_interpolated_not_copied():
    source, target = plans_of(primus([16, 32, 16]), [16, 32, 16]), plans_of(primus([32, 16, 16]), [32, 16, 16])
    result, before, after = adapted_to(source, target)
    assert [row.action for row in result.table.rows if row.key == "eva.pos_embed"] == ["adapted"]
    image = torch.randn(1, 1, 32, 16, 16)
    assert torch.allclose(features(before, image)[0], features(after, image)[0], atol=1e-5)


def test_flat_kernels_grow_without_changing_features():
    source, target = plans_of(resenc(kernels=[1, 3, 3]), [16] * 3), plans_of(resenc(), [16] * 3)
    result, before, after = adapted_to(source, target, TWO_CHANNELS)
    scan = torch.randn(1, 1, 16, 16, 16)
    pairs = zip(features(before, scan), features(after, scan.expand(-1, 2, -1, -1, -1)), strict=True)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in pairs)
    grown = [row for row in result.table.rows if "padded" in row.why]
    assert len(grown) > 5 and all(row.source[2:] == (1, 3, 3) and row.target[2:] == (3, 3, 3) for row in grown)


@pytest.mark.parametrize(("old", "new"), [(3, 4), (4, 3)])
def test_another_depth_shares_the_common_stages(old, new):
    source, target = plans_of(resenc(old), [16] * 3), plans_of(resenc(new), [16] * 3)
    result, before, after = adapted_to(source, target)
    image = torch.randn(1, 1, 16, 16, 16)
    for a, b in zip(features(before, image)[:3], features(after, image)[:3], strict=True):
        assert torch.equal(a, b)
    actions = {row.key: row for row in result.table.rows}
    deepest = [row for key, row in actions.items() if key.startswith("encoder.stages.3.")]
    assert deepest and {row.action for row in deepest} == {"new" if new > old else "skipped"}
    decoder = [row for key, row in actions.items() if key.startswith("decoder.") and row.action != "skipped"]
    assert all(row.action == "new" for row in decoder)
    assert any("stages" in row.why for row in decoder)


def test_deeper_primus_shares_the_common_blocks():
    source, target = plans_of(primus([16] * 3), [16] * 3), plans_of(primus([16] * 3, eva_depth=3), [16] * 3)
    result, _, _ = adapted_to(source, target)
    by_block = {row.key.split(".")[2]: row.action for row in result.table.rows if row.key.startswith("eva.blocks.")}
    assert by_block == {"0": "loaded", "1": "loaded", "2": "new"}


@pytest.mark.parametrize(
    ("source", "target", "named"),
    [
        (resenc(), primus([16] * 3), "holds a ResidualEncoderUNet, plans nnsslTestPlans build a SegmentationPrimus"),
        (
            primus([16] * 3),
            primus([16] * 3, strides=3),
            r"tokens are \(4, 4, 4\) voxels in the checkpoint, \(8, 8, 8\)",
        ),
        (primus([16] * 3), primus([16] * 3, embed_dim=72), "embed_dim is 36 in the checkpoint, 72 in the plans"),
        (primus([16] * 3, num_register_tokens=4), primus([16] * 3), "num_register_tokens is 4 in the checkpoint, 0"),
        (resenc(), resenc(kernels=[1, 3, 3]), r"stage 0: kernels of \[3, 3, 3\] cannot become \[1, 3, 3\]"),
        (
            resenc(),
            resenc(strides=[[1, 1, 1], [1, 2, 2], [2, 2, 2]]),
            r"stage 1: strides is \[2, 2, 2\] in the checkpoint",
        ),
        (resenc(), resenc(features_per_stage=[4, 8, 16]), "stage 2: features_per_stage is 12 in the checkpoint, 16"),
        (resenc(), resenc(n_blocks_per_stage=[1, 3, 2]), "stage 1: n_blocks_per_stage is 2 in the checkpoint, 3"),
        (resenc(), resenc(nonlin="torch.nn.ReLU"), "nonlin is torch.nn.LeakyReLU in the checkpoint, torch.nn.ReLU"),
    ],
)
def test_what_does_not_fit_is_refused_by_name_with_a_remedy(source, target, named):
    with pytest.raises(NnsslError, match=named) as refused:
        adapted_to(plans_of(source, [16] * 3), plans_of(target, [16] * 3))
    assert "source.pth" in refused.value.what and "-p" in refused.value.fix


def test_weights_that_belie_their_plans_are_refused_by_key():
    plans = plans_of(primus([16] * 3), [16] * 3)
    content = content_of(plans)
    content["network_weights"]["eva.norm.weight"] = torch.zeros(40)
    with pytest.raises(NnsslError, match=r"1 encoder tensors: eva\.norm\.weight is \(40,\), needed \(36,\)"):
        adapt(from_ours(content, "source.pth"), plans, "3d_fullres", DATASET_JSON, "x")


def test_never_trained_tensors_are_new_and_stay_listed():
    plans = plans_of(resenc(), [16] * 3)
    content = content_of(plans, pretrained_prefixes=("encoder.",))
    result = adapt(from_ours(content, "source.pth"), plans, "3d_fullres", DATASET_JSON, "x")
    decoder = [row for row in result.table.rows if row.key.startswith(("decoder.stages.", "decoder.transpconvs."))]
    assert decoder and all(row.action == "new" and "never trained" in row.why for row in decoder)
    assert not any(key.startswith("decoder.encoder.") for key in result.table.keys("new"))


def test_the_table_accounts_for_every_name_once_and_prints(capsys):
    from rich.console import Console

    plans = plans_of(resenc(), [16] * 3)
    result, before, _ = adapted_to(plans, plans)
    names = [name for row in result.table.rows for name in (row.key, *row.aliases)]
    assert sorted(names) == sorted(before.network.state_dict())
    stem = next(row for row in result.table.rows if row.key == "encoder.stem.convs.0.conv.weight")
    assert "decoder.encoder.stem.convs.0.all_modules.0.weight" in stem.aliases and len(stem.aliases) == 3
    assert json.loads(json.dumps(result.table.as_json()))["counts"] == result.table.counts()
    Console(width=200).print(result.table.as_table())
    assert "encoder.stem.convs.0.conv.weight" in capsys.readouterr().out


def test_other_normalisation_and_padding_are_noted():
    plans = plans_of(primus([16] * 3), [16] * 3)
    source = from_ours(content_of(plans), "source.pth")
    assert adapt(source, plans, "3d_fullres", DATASET_JSON, "x").notes == ()
    plans["configurations"]["3d_fullres"] |= {
        "normalization_schemes": ["CTNormalization"],
        "median_image_size_in_voxels": [10.0, 10.0, 16.0],
    }
    normalisation, padding = adapt(source, plans, "3d_fullres", DATASET_JSON, "x").notes
    assert "['CTNormalization'], the pretraining did with ['ZScoreNormalization']" in normalisation
    assert "16x16x16 voxels is mostly padding around the median scan of 10x10x16" in padding


def test_cascades_and_2d_are_refused():
    source = from_ours(content_of(plans_of(primus([16] * 3), [16] * 3)), "source.pth")
    plans = plans_of(primus([16] * 3), [16] * 3)
    plans["configurations"]["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    with pytest.raises(NnsslError, match="3d_cascade_fullres of nnsslTestPlans is 2D or the second stage"):
        adapt(source, plans, "3d_cascade_fullres", DATASET_JSON, "x")


def test_names_that_nnunet_would_split_are_refused():
    assert adapted_name("nnUNetPlans", "MAE-1_b") == "nnUNetPlans_MAE-1_b"
    for bad in ("a__b", "a/b", "", "_a", "a_"):
        with pytest.raises(NnsslError, match="--name"):
            adapted_name("nnUNetPlans", bad)


def test_shaking_reaches_every_parameter():
    """The comparisons above rely on it: no parameter may still be a constant."""
    network = nn.Sequential(nn.Conv3d(1, 4, 1), nn.InstanceNorm3d(4, affine=True))
    shake(network)
    assert all(parameter.std() > 0 for parameter in network.parameters())
