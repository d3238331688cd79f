"""Both backbones: contracts, masks, decoders, and what stock nnU-Net loads of them."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from network_plans import PLAIN, plans_of, primus_plans, unet_plans
from nnunetv2.experiment_planning.experiment_planners.residual_unets import residual_encoder_unet_planners
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.primus import primus_trainers
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from nnssl_ext.contracts import Backbone, TokenBackbone
from nnssl_ext.errors import NnsslError
from nnssl_ext.networks.build import build_backbone, build_network
from nnssl_ext.networks.presets import PRIMUS_PRESETS, RESENC_PRESETS

PLANS = {
    "primus": primus_plans(),
    "primus with class token": primus_plans(class_token=True, num_register_tokens=2),
    "resenc": unet_plans(),
    "plain": unet_plans(PLAIN),
}


@pytest.fixture(params=PLANS)
def plans(request: pytest.FixtureRequest) -> dict[str, Any]:
    return PLANS[request.param]


def backbone_of(plans: dict[str, Any], channels: int = 1) -> Any:
    torch.manual_seed(0)
    return build_backbone(plans, "3d_fullres", channels).eval()


def blocks_mask(batch: int, grid: tuple[int, int, int], share: float = 0.5) -> torch.Tensor:
    """As many hidden cells in each sample, at random places."""
    cells = grid[0] * grid[1] * grid[2]
    order = torch.rand(batch, cells).argsort(dim=1)
    return (order < int(share * cells)).reshape(batch, *grid)


def voxel_mask(mask: torch.Tensor, cell: int) -> torch.Tensor:
    return mask.repeat_interleave(cell, 1).repeat_interleave(cell, 2).repeat_interleave(cell, 3)[:, None]


def test_contract(plans: dict[str, Any]) -> None:
    backbone = backbone_of(plans)
    assert isinstance(backbone, Backbone)
    assert isinstance(backbone, TokenBackbone) == (backbone.token_size is not None)
    x = torch.randn(2, 1, *(2 * d for d in backbone.divisor))
    features = backbone.forward_features(x)
    assert tuple(m.shape[1] for m in features.levels) == backbone.channels
    assert features.strides == backbone.strides
    for level, stride in zip(features.levels, features.strides, strict=True):
        assert tuple(level.shape[2:]) == tuple(s // d for s, d in zip(x.shape[2:], stride, strict=True))
    assert features.summary.shape == (2, backbone.channels[-1])


def test_prefixes_cover_the_network_once(plans: dict[str, Any]) -> None:
    backbone = backbone_of(plans)
    for name in backbone.network.state_dict():
        halves = (
            name.startswith(backbone.encoder_prefixes),
            name.startswith(backbone.decoder_prefixes),
            ".seg_layers." in name,
        )
        assert sum(halves) == 1, name


def test_decoder_maps_are_those_of_the_segmentation_network(plans: dict[str, Any]) -> None:
    backbone = backbone_of(plans)
    network = backbone.network
    x = torch.randn(1, 1, 16, 16, 16)
    decoded = backbone.forward_decoder(backbone.forward_features(x))
    network.decoder.deep_supervision = True
    heads = network.decoder.seg_layers[::-1]
    for logits, head, level, stride in zip(network(x), heads, decoded.levels, decoded.strides, strict=True):
        torch.testing.assert_close(head(level), logits)
        assert tuple(level.shape[2:]) == tuple(16 // s for s in stride)


def test_nothing_behind_the_mask_is_seen(plans: dict[str, Any]) -> None:
    backbone = backbone_of(plans)
    x = torch.randn(2, 1, 16, 16, 16)
    mask = blocks_mask(2, (4, 4, 4))
    spoiled = torch.where(voxel_mask(mask, 4), torch.tensor(float("nan")), x)
    seen, seen_spoiled = (backbone.forward_features(v, mask) for v in (x, spoiled))
    assert torch.equal(seen.summary, seen_spoiled.summary)
    for one, other in zip(seen.levels, seen_spoiled.levels, strict=True):
        assert torch.equal(one, other)
    if isinstance(backbone, TokenBackbone):
        assert torch.equal(backbone.forward_visible(x, mask)[0], backbone.forward_visible(spoiled, mask)[0])


def test_everything_before_the_mask_is_seen(plans: dict[str, Any]) -> None:
    backbone = backbone_of(plans)
    mask = blocks_mask(1, (4, 4, 4))
    for cell in (~mask[0]).nonzero().tolist():
        x = torch.randn(1, 1, 16, 16, 16)
        changed = x.clone()
        z, y, xx = (4 * c for c in cell)
        changed[0, 0, z + 1, y + 2, xx + 3] += 1
        pair = [backbone.forward_features(v, mask).levels[-1] for v in (x, changed)]
        assert not torch.equal(*pair)


def test_resenc_zeroes_masked_voxels_for_any_grid_that_divides() -> None:
    backbone = backbone_of(unet_plans())
    x = torch.randn(1, 1, 16, 16, 16)
    mask = blocks_mask(1, (2, 2, 2))
    by_hand = backbone.forward_features(x * ~voxel_mask(mask, 8))
    for one, other in zip(backbone.forward_features(x, mask).levels, by_hand.levels, strict=True):
        assert torch.equal(one, other)
    with pytest.raises(NnsslError, match="does not divide"):
        backbone.forward_features(x, blocks_mask(1, (3, 2, 2)))
    with pytest.raises(NnsslError, match="not divisible"):
        backbone.forward_features(torch.randn(1, 1, 18, 16, 18))


def test_masked_tokens_are_the_mask_token_and_train_it() -> None:
    backbone = backbone_of(primus_plans(eva_depth=0))
    backbone.network.eva.norm = nn.Identity()
    with torch.no_grad():
        backbone.mask_token.fill_(7.0)
    mask = blocks_mask(1, (4, 4, 4))
    level = backbone.forward_features(torch.randn(1, 1, 16, 16, 16), mask).levels[0]
    without_position = level.flatten(2).transpose(1, 2) - backbone.network.eva.pos_embed
    torch.testing.assert_close(without_position[0][mask.flatten()], torch.full((32, 24), 7.0))
    level.sum().backward()
    assert backbone.mask_token.grad is not None
    assert "mask_token" not in backbone.network.state_dict()


def test_all_visible_equals_the_whole_grid() -> None:
    backbone = backbone_of(primus_plans(class_token=True))
    x = torch.randn(2, 1, 8, 16, 12)
    tokens, ids = backbone.forward_visible(x, torch.zeros(2, 2, 4, 3, dtype=torch.bool))
    assert torch.equal(ids, torch.arange(24).expand(2, -1))
    level = backbone.forward_features(x).levels[0]
    torch.testing.assert_close(tokens, level.flatten(2).transpose(1, 2), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("hidden", [(3, 4), (64, 64)])
def test_uneven_or_empty_masks_are_refused(hidden: tuple[int, int]) -> None:
    mask = torch.stack([torch.arange(64).reshape(4, 4, 4) < n for n in hidden])
    with pytest.raises(NnsslError, match="show"):
        backbone_of(primus_plans()).forward_visible(torch.randn(2, 1, 16, 16, 16), mask)


def test_a_mask_off_the_token_grid_is_refused() -> None:
    with pytest.raises(NnsslError, match="grid of"):
        backbone_of(primus_plans()).forward_visible(torch.randn(1, 1, 16, 16, 16), blocks_mask(1, (2, 2, 2)))


@pytest.mark.parametrize("channels", [1, 2])
def test_stock_loader_fills_a_network_of_another_class_count(
    plans: dict[str, Any], channels: int, tmp_path: Path
) -> None:
    pretrained = backbone_of(plans, channels)
    with torch.no_grad():
        for parameter in pretrained.network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    torch.save({"network_weights": pretrained.network.state_dict()}, tmp_path / "checkpoint_final.pth")

    manager = PlansManager(plans)
    configuration = manager.get_configuration("3d_fullres")
    target = nnUNetTrainer.build_network_architecture(manager, configuration, channels, 5, True)
    load_pretrained_weights(target, tmp_path / "checkpoint_final.pth")

    loaded = type(pretrained)(target).eval()
    x = torch.randn(1, channels, 16, 16, 16)
    ours, theirs = pretrained.forward_features(x), loaded.forward_features(x)
    for one, other in zip(ours.levels, theirs.levels, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(pretrained.forward_decoder(ours).levels, loaded.forward_decoder(theirs).levels, strict=True):
        assert torch.equal(one, other)
    assert target(x)[0].shape == (1, 5, 16, 16, 16)


def test_unknown_networks_are_named() -> None:
    with pytest.raises(NnsslError, match=r"nowhere\.to\.be\.Found"):
        build_network(plans_of("nowhere.to.be.Found", {}), "3d_fullres", 1, 2)
    with pytest.raises(NnsslError, match="known: 3d_fullres"):
        build_network(unet_plans(), "3d_lowres", 1, 2)
    kwargs = {**unet_plans(PLAIN)["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]}
    other = "dynamic_network_architectures.architectures.unet.ResidualUNet"
    kwargs["n_blocks_per_stage"] = kwargs.pop("n_conv_per_stage")
    plans = plans_of(other, kwargs, ("conv_op", "norm_op", "dropout_op", "nonlin"))
    with pytest.raises(NnsslError, match="ResidualUNet"):
        build_backbone(plans, "3d_fullres", 1)


def test_nothing_that_foreign_plans_name_is_imported_or_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "foreign_module.py").write_text(
        f"open({str(tmp_path / 'imported')!r}, 'w')\ndef layer(*given, **named): open({str(tmp_path / 'called')!r}, 'w')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(NnsslError, match=r"foreign_module\.layer"):
        build_network(plans_of("foreign_module.layer", {}), "3d_fullres", 1, 2)
    with pytest.raises(NnsslError, match=r"torch\.hub\.load"):
        build_network(plans_of("torch.hub.load", {"repo_or_dir": str(tmp_path)}), "3d_fullres", 1, 2)
    for part in (
        "foreign_module.layer",
        "os.system",
        "torch.nn.modules.module.functools.partial",
        "torch.nn.Parameter",
    ):
        plans = unet_plans()
        plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["norm_op"] = part
        with pytest.raises(NnsslError, match=f"{part} as norm_op"):
            build_network(plans, "3d_fullres", 1, 2)
    assert {path.name for path in tmp_path.iterdir()} == {"foreign_module.py"}


@pytest.mark.parametrize("size", ["S", "B", "M", "L"])
def test_presets_are_those_of_stock_primus_trainers(size: str) -> None:
    preset = PRIMUS_PRESETS[f"Primus{size}"]
    shape = [32, 32, 32]
    plans = primus_plans(
        embed_dim=preset.embed_dim,
        eva_depth=preset.depth,
        eva_numheads=preset.num_heads,
        input_shape=shape,
        strides=[[1] * 3, [2] * 3, [2] * 3, [2] * 3],
        drop_path_rate=preset.drop_path_rate,
        init_values=preset.init_values,
        scale_attn_inner=preset.scale_attn_inner,
    )
    trainer = getattr(primus_trainers, f"nnUNet_Primus_{size}_Trainer")
    with torch.device("meta"):  # shapes only
        ours = build_network(plans, "3d_fullres", 1, 3)
        stock = trainer.build_network_architecture(None, SimpleNamespace(patch_size=shape), 1, 3)
    for key, value in stock.state_dict().items():
        if not key.startswith("up_projection.") and key != "mask_token":
            assert ours.state_dict()[key].shape == value.shape, key
    assert len(ours.eva.blocks) == len(stock.eva.blocks)
    for one, other in zip(ours.eva.blocks, stock.eva.blocks, strict=True):
        assert repr(one) == repr(other)  # heads, norms and drop-path too
        assert one.attn.num_heads == other.attn.num_heads


def test_resenc_presets_are_those_of_nnunet() -> None:
    for size, memory in {"M": 8, "L": 24, "XL": 40}.items():
        preset = RESENC_PRESETS[f"ResEnc{size}"]
        stock = inspect.signature(getattr(residual_encoder_unet_planners, f"nnUNetPlannerResEnc{size}"))
        assert preset.memory_gb == stock.parameters["gpu_memory_target_in_gb"].default == memory
        assert preset.blocks_per_stage == (1, 3, 4, 6, 6, 6)
        assert (preset.base_features, preset.max_features) == (32, 320)


def run_python(code: str) -> None:
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], check=False, capture_output=True, text=True, timeout=120
    )
    assert finished.returncode == 0, finished.stderr


def test_presets_load_no_torch() -> None:
    run_python("import sys, nnssl_ext.networks.presets; assert 'torch' not in sys.modules")


def test_convolutional_networks_need_no_timm() -> None:
    run_python(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from network_plans import unet_plans\n"
        "from nnssl_ext.networks.build import build_backbone\n"
        "build_backbone(unet_plans(), '3d_fullres', 1); assert 'timm' not in sys.modules"
    )


def test_primus_survives_a_torchvision_that_does_not_fit_torch() -> None:
    """As with a CPU torch beside a CUDA torchvision: its compiled half cannot be loaded."""
    run_python(
        "import torch\n"
        "def refuse(path): raise OSError(f'{path}: libcudart.so not found')\n"
        "torch.ops.load_library = refuse\n"
        "try: import torchvision\n"
        "except RuntimeError as error: assert 'torchvision::nms' in str(error)\n"
        "else: raise SystemExit('torchvision was meant to fail here')\n"
        "from nnssl_ext.networks.primus import SegmentationPrimus\n"
        "network = SegmentationPrimus(1, 2, 24, 1, 2, [8, 8, 8], [[1, 1, 1], [4, 4, 4]])\n"
        "network(torch.randn(1, 1, 8, 8, 8)).sum().backward()"
    )


def test_primus_is_imported_without_warnings_of_other_packages() -> None:
    code = "import warnings; warnings.simplefilter('always'); import nnssl_ext.networks.primus"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "torch.jit" not in done.stderr
