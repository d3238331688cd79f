"""Swin UNETR against MONAI's own, and behind our contract."""

import sys

import pytest
import torch
from network_plans import swin_plans

from nnssl_ext.contracts import Backbone
from nnssl_ext.errors import NnsslError
from nnssl_ext.networks.build import build_backbone, build_network

swin_unetr = pytest.importorskip("monai.networks.nets.swin_unetr", reason="Swin UNETR needs MONAI (extra: swin)")

MONAI_NAMES = {
    "encoder10.": "decoder.bottleneck.",
    **{f"encoder{number}.": f"decoder.skips.{number - 1}." for number in (1, 2, 3, 4)},
    **{f"decoder{number}.": f"decoder.stages.{5 - number}." for number in (1, 2, 3, 4, 5)},
    "out.conv.conv.": "decoder.seg_layers.4.",
}


def monai_network(channels: int, classes: int, **changes):
    kwargs = swin_plans(**changes)["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    del kwargs["strides"]
    return swin_unetr.SwinUNETR(channels, classes, **kwargs)


def in_our_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renamed = {}
    for name, value in state.items():
        found = [(theirs, ours) for theirs, ours in MONAI_NAMES.items() if name.startswith(theirs)]
        renamed[found[0][1] + name.removeprefix(found[0][0]) if found else name] = value
    return renamed


def test_with_monais_weights_it_computes_what_monais_does():
    torch.manual_seed(0)
    theirs = monai_network(2, 3).eval()
    ours = build_network(swin_plans(), "3d_fullres", 2, 3).eval()
    missing, unexpected = ours.load_state_dict(in_our_names(theirs.state_dict()), strict=False)
    assert not unexpected
    assert {name.split(".")[1] for name in missing} == {"seg_layers"}  # of the coarser resolutions
    image = torch.randn(1, 2, 64, 32, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(image), theirs(image))


def test_deep_supervision_gives_all_resolutions_finest_first():
    network = build_network(swin_plans(), "3d_fullres", 1, 3, deep_supervision=True)
    logits = network(torch.randn(1, 1, 64, 32, 32))
    assert [tuple(map_.shape) for map_ in logits] == [(1, 3, 64 // s, 32 // s, 32 // s) for s in (1, 2, 4, 8, 16)]
    network.decoder.deep_supervision = False
    assert network(torch.randn(1, 1, 64, 32, 32)).shape == (1, 3, 64, 32, 32)


def test_it_keeps_the_backbone_contract():
    backbone = build_backbone(swin_plans(), "3d_fullres", 2, 4).eval()
    assert isinstance(backbone, Backbone)
    x = torch.randn(2, 2, 64, 32, 32)
    with torch.no_grad():
        features = backbone.forward_features(x)
        decoded = backbone.forward_decoder(features)
        logits = backbone.network.decoder.seg_layers[-1](decoded.levels[0])
        torch.testing.assert_close(logits, backbone.network(x))
    for found, channels in ((features, backbone.channels), (decoded, backbone.decoder_channels)):
        for level, stride, width in zip(found.levels, found.strides, channels, strict=True):
            assert level.shape == (2, width, *(n // s for n, s in zip((64, 32, 32), stride, strict=True)))
    assert backbone.channels == (2, 12, 24, 48, 96, 192)
    torch.testing.assert_close(features.summary, features.levels[-1].mean((2, 3, 4)))


def test_hidden_voxels_reach_neither_encoder_nor_skips():
    backbone = build_backbone(swin_plans(), "3d_fullres", 1).eval()
    x, mask = torch.randn(1, 1, 64, 32, 32), torch.zeros(1, 8, 4, 4, dtype=torch.bool)
    mask[:, :4] = True
    changed = x.clone()
    changed[:, :, :32] += 5
    with torch.no_grad():
        a, b = (backbone.forward_decoder(backbone.forward_features(v, mask)) for v in (x, changed))
        c = backbone.forward_decoder(backbone.forward_features(changed))
    assert torch.equal(a.levels[0], b.levels[0])
    assert not torch.equal(a.levels[0], c.levels[0])


def test_prefixes_cover_all_but_the_segmentation_layers_and_encoder_prefixes_what_features_need():
    backbone = build_backbone(swin_plans(), "3d_fullres", 1)
    names = [name for name, _ in backbone.network.named_parameters()]
    halves = backbone.encoder_prefixes + backbone.decoder_prefixes
    assert all(name.startswith(halves) != (".seg_layers." in name) for name in names)
    features = backbone.forward_features(torch.randn(2, 1, 32, 32, 32))
    (features.summary * torch.randn(192)).sum().backward()
    for name, parameter in backbone.network.named_parameters():
        assert (parameter.grad is not None) == name.startswith(backbone.encoder_prefixes), name


def test_the_parts_that_nnunets_loaders_ask_for_exist():
    network = build_network(swin_plans(), "3d_fullres", 3, 2)
    network.get_submodule(network.key_to_encoder)
    network.get_submodule(network.key_to_stem)
    assert all(network.get_submodule(name).weight.shape[1] == 3 for name in network.keys_to_in_proj)
    depends = [name for name, value in network.state_dict().items() if value.ndim == 5 and value.shape[1] == 3]
    assert set(depends) == {f"{name}.weight" for name in network.keys_to_in_proj}


def test_what_cannot_work_is_refused_by_name(monkeypatch):
    with pytest.raises(NnsslError, match="strides"):
        build_network(swin_plans(strides=[[1, 1, 1], [1, 2, 2]]), "3d_fullres", 1, 2)
    network = build_network(swin_plans(), "3d_fullres", 1, 2)
    with pytest.raises(NnsslError, match="48x32x32") as refused:
        network(torch.randn(1, 1, 48, 32, 32))
    assert "multiple of 32" in refused.value.fix
    backbone = build_backbone(swin_plans(), "3d_fullres", 1)
    with pytest.raises(NnsslError, match=r"32x32x32 voxels .* a single place"):
        backbone.forward_decoder(backbone.forward_features(torch.randn(1, 1, 32, 32, 32)))
    monkeypatch.setitem(sys.modules, "monai.networks.nets.swin_unetr", None)  # as if it were not installed
    with pytest.raises(NnsslError, match="needs MONAI") as refused:
        build_network(swin_plans(), "3d_fullres", 1, 2)
    assert "nnssl-ext[swin]" in refused.value.fix
