"""SegmentationPrimus against DNA's Primus, against the geometry of its tokens, and as nnU-Net drives it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from dynamic_network_architectures.architectures.primus import Primus
from network_plans import primus_plans
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from nnssl_ext.errors import NnsslError
from nnssl_ext.networks.eva import rotary_positions
from nnssl_ext.networks.primus import ChannelNorm, SegmentationPrimus, as_map, default_decoder_widths
from nnssl_ext.networks.primus_backbone import PrimusBackbone

SHAPE = (16, 24, 8)  # 4x6x2 tokens of 4 voxels: all edges differ, so that swapped axes show


def dna_primus() -> Primus:
    """DNA's Primus as nnU-Net's trainers set it, with positions and LayerScale large enough to matter."""
    torch.manual_seed(0)
    network = Primus(1, 24, (4, 4, 4), 3, 3, 2, SHAPE, init_values=0.1, scale_attn_inner=True)
    with torch.no_grad():
        network.eva.pos_embed.normal_()
        for block in network.eva.blocks:
            block.gamma_1.fill_(1.0)
    return network


def our_primus(input_shape: tuple[int, int, int] = SHAPE, **changes: Any) -> SegmentationPrimus:
    settings = {
        "num_classes": 3,
        "embed_dim": 24,
        "eva_depth": 3,
        "eva_numheads": 2,
        "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]],
        "drop_path_rate": 0.0,
    }
    return SegmentationPrimus(1, input_shape=input_shape, **{**settings, **changes})


def with_dna_weights(reference: Primus, **kwargs: Any) -> SegmentationPrimus:
    network = our_primus(**kwargs)
    missing, unexpected = network.load_state_dict(reference.state_dict(), strict=False)
    assert all(key.startswith("decoder.") for key in missing)  # every encoder weight has DNA's name and shape
    assert all(key.startswith("up_projection.") or key == "mask_token" for key in unexpected)
    return network.eval()


def dna_tokens(reference: Primus, x: torch.Tensor) -> torch.Tensor:
    """DNA's encoder output as a volume, by its own reading of the axes."""
    tokens = reference.down_projection(x)
    batch, channels, w, h, d = tokens.shape
    encoded, _ = reference.eva(tokens.reshape(batch, channels, w * h * d).permute(0, 2, 1))
    return encoded.permute(0, 2, 1).reshape(batch, channels, w, h, d)


def test_encoder_equals_dna_primus() -> None:
    reference = dna_primus().eval()
    x = torch.randn(2, 1, *SHAPE)
    ours = PrimusBackbone(with_dna_weights(reference)).forward_features(x).levels[0]
    torch.testing.assert_close(ours, dna_tokens(reference, x), atol=1e-5, rtol=1e-5)


def test_visible_tokens_equal_dna_primus_that_may_not_attend_to_hidden_ones() -> None:
    """Witness: all tokens through DNA's blocks, with hidden keys masked out of every attention."""
    reference = dna_primus().eval()
    x = torch.randn(2, 1, *SHAPE)
    mask = torch.ones(2, 48, dtype=torch.bool)
    for sample in range(2):
        mask[sample, torch.randperm(48)[:12]] = False
    current = reference.down_projection(x).flatten(2).transpose(1, 2) + reference.eva.pos_embed
    for block in reference.eva.blocks:
        current = block(current, rope=reference.eva.rope.get_embed(), attn_mask=~mask[:, None, None])
    expected = reference.eva.norm(current)

    ours, ids = PrimusBackbone(with_dna_weights(reference)).forward_visible(x, mask.reshape(2, 4, 6, 2))
    for sample in range(2):
        assert torch.equal(ids[sample], (~mask[sample]).nonzero()[:, 0])
        torch.testing.assert_close(ours[sample], expected[sample][ids[sample]], atol=1e-5, rtol=1e-5)


def test_tokens_masks_and_segmentation_share_one_geometry() -> None:
    """A volume of its own coordinates, read by a token embedding that averages: each visible token must then hold the
    centre of the voxels that its index stands for, and none of them may be masked."""
    network = our_primus(eva_depth=0, class_token=True, num_register_tokens=2)
    backbone = PrimusBackbone(network)
    network.eva.norm = nn.Identity()
    with torch.no_grad():
        network.down_projection.proj = nn.Conv3d(3, 24, 4, stride=4, bias=False)
        network.down_projection.proj.weight.zero_()
        for axis in range(3):
            network.down_projection.proj.weight[axis, axis] = 1 / 64
        network.eva.pos_embed.zero_()
    voxels = torch.from_numpy(np.indices(SHAPE)).float()[None].expand(2, -1, -1, -1, -1)
    mask = torch.ones(2, 48, dtype=torch.bool)
    for sample in range(2):
        mask[sample, torch.randperm(48)[:13]] = False
    mask = mask.reshape(2, 4, 6, 2)

    tokens, ids = backbone.forward_visible(voxels, mask)
    for sample in range(2):
        seen = [tuple(((c - 1.5) / 4).round().int().tolist()) for c in tokens[sample, :, :3]]
        assert seen == [tuple(i) for i in (~mask[sample]).nonzero().tolist()]  # C order, and exactly the visible cells
        assert seen == [np.unravel_index(int(i), (4, 6, 2)) for i in ids[sample]]
    level = backbone.forward_features(voxels).levels[0]
    for z, y, x in np.ndindex(4, 6, 2):
        centre = torch.tensor([z, y, x]) * 4 + 1.5
        torch.testing.assert_close(level[0, :3, z, y, x], centre)


def test_decoder_keeps_every_token_in_its_place() -> None:
    network = our_primus().eval()
    tokens = torch.randn(1, 24, 4, 6, 2)
    changed = tokens.clone()
    changed[0, :, 3, 1, 0] += 1
    touched = (network.decoder(changed) != network.decoder(tokens)).any(dim=1)[0]
    expected = torch.zeros(SHAPE, dtype=torch.bool)
    expected[12:16, 4:8, 0:4] = True
    assert torch.equal(touched, expected)


def test_rotary_angles_are_token_coordinates_times_frequencies() -> None:
    head_dim, grid = 12, (3, 4, 2)
    rows = rotary_positions(grid, head_dim, torch.device("cpu"))
    sines, cosines = rows.chunk(2, dim=-1)
    frequencies = [10000.0**-0.0, 10000.0**-0.5]  # head_dim / 6 per axis
    for row, index in enumerate(np.ndindex(*grid)):
        angles = [c * f for c in index for f in frequencies for _ in range(2)]  # each rotates a pair of channels
        np.testing.assert_allclose(sines[row], np.sin(angles), atol=1e-6)
        np.testing.assert_allclose(cosines[row], np.cos(angles), atol=1e-6)


def test_a_local_crop_is_a_piece_of_the_grid_not_a_stretched_one() -> None:
    device = torch.device("cpu")
    large = rotary_positions((4, 6, 5), 12, device).reshape(4, 6, 5, 24)
    small = rotary_positions((2, 3, 4), 12, device).reshape(2, 3, 4, 24)
    assert torch.equal(small, large[:2, :3, :4])


@pytest.mark.parametrize("size", [(8, 8, 8), (16, 24, 8), (24, 4, 12)])
def test_any_size_that_the_token_divides(size: tuple[int, int, int]) -> None:
    assert our_primus()(torch.randn(1, 1, *size)).shape == (1, 3, *size)


def test_learned_positions_are_interpolated_between_token_centres() -> None:
    network = our_primus((16, 4, 4), strides=[[1, 1, 1], [4, 4, 4]])  # 4x1x1 tokens
    with torch.no_grad():
        network.eva.pos_embed.copy_(torch.tensor([0.0, 1.0, 2.0, 3.0])[None, :, None].expand(1, 4, 24))
    halved = network.positions((2, 1, 1))
    torch.testing.assert_close(halved[0, :, 0], torch.tensor([0.5, 2.5]))  # each new token covers two old ones
    assert network.positions((4, 1, 1)) is network.eva.pos_embed


def test_anisotropic_tokens() -> None:
    network = our_primus(strides=[[1, 1, 1], [1, 2, 2], [2, 2, 2]], deep_supervision=True)
    assert network.token_size == (2, 4, 4)
    assert network.reference_grid == (8, 6, 2)
    outputs = network(torch.randn(1, 1, 8, 8, 8))
    assert [tuple(o.shape[2:]) for o in outputs] == [(8, 8, 8), (8, 4, 4)]


def test_class_and_register_tokens_live_beside_the_encoder() -> None:
    network = our_primus(class_token=True, num_register_tokens=3).eval()
    assert network.class_token.shape == (1, 1, 24)
    assert network.register_tokens.shape == (1, 3, 24)
    assert network.eva.pos_embed.shape == (1, 48, 24)
    x = torch.randn(2, 1, *SHAPE)
    backbone = PrimusBackbone(network)
    features = backbone.forward_features(x)
    assert features.levels[0].shape == (2, 24, 4, 6, 2)
    prefix, _ = network.encode(network.embed(x) + network.positions((4, 6, 2)), (4, 6, 2))
    assert prefix.shape == (2, 4, 24)
    assert torch.equal(features.summary, prefix[:, 0])
    with torch.no_grad():
        network.register_tokens[0, 1] += 1.0
    assert not torch.equal(backbone.forward_features(x).levels[0], features.levels[0])  # registers are attended to


def test_prefix_tokens_are_not_rotated() -> None:
    """Witness: the same blocks without any notion of a prefix, on positions that begin with rows of angle zero."""
    network = our_primus(class_token=True, num_register_tokens=2).eval()
    tokens = torch.randn(2, 48, 24)
    prefix, encoded = network.encode(tokens, (4, 6, 2))
    rows = rotary_positions((4, 6, 2), 12, torch.device("cpu"))
    unrotated = torch.cat((torch.zeros(3, 12), torch.ones(3, 12)), dim=1)
    current = torch.cat(
        (network.class_token.expand(2, -1, -1), network.register_tokens.expand(2, -1, -1), tokens), dim=1
    )
    for block in network.eva.blocks:
        block.attn.num_prefix_tokens = 0
        current = block(current, rope=torch.cat((unrotated, rows)))
    torch.testing.assert_close(torch.cat((prefix, encoded), dim=1), network.eva.norm(current))


def test_only_segmentation_layers_know_the_number_of_classes() -> None:
    few, many = (our_primus(num_classes=n).state_dict() for n in (2, 117))
    differing = {key for key in few if few[key].shape != many[key].shape}
    assert few.keys() == many.keys()
    assert differing == {f"decoder.seg_layers.{i}.{part}" for i in (0, 1) for part in ("weight", "bias")}


def test_deep_supervision_gives_the_scales_that_nnunet_computes() -> None:
    manager = PlansManager(primus_plans(strides=[[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2]])).get_configuration(
        "3d_fullres"
    )
    trainer = SimpleNamespace(enable_deep_supervision=True, configuration_manager=manager, is_ddp=False)
    scales = nnUNetTrainer._get_deep_supervision_scales(trainer)
    network = nnUNetTrainer.build_network_architecture(PlansManager(primus_plans()), manager, 1, 3, True)
    outputs = network(torch.randn(1, 1, 16, 16, 16))
    assert [tuple(o.shape[2:]) for o in outputs] == [tuple(round(16 * s) for s in scale) for scale in scales]

    trainer.network = network
    nnUNetTrainer.set_deep_supervision_enabled(trainer, False)
    single = network.eval()(torch.ones(1, 1, 16, 16, 16))
    nnUNetTrainer.set_deep_supervision_enabled(trainer, True)
    assert torch.equal(network(torch.ones(1, 1, 16, 16, 16))[0], single)


def test_initialisation_is_he_for_convolutions_and_dna_for_the_rest() -> None:
    torch.manual_seed(0)
    network = our_primus(embed_dim=96, eva_numheads=4)
    weight = network.down_projection.proj.weight
    assert weight.std().item() == pytest.approx((2 / (1 + 1e-4) / 64) ** 0.5, rel=0.05)  # He, fan-in 4x4x4 voxels
    assert network.eva.blocks[0].attn.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.equal(network.decoder.stages[0][0].bias, torch.zeros_like(network.decoder.stages[0][0].bias))


def test_channel_norm_normalises_each_voxel_over_channels() -> None:
    x = torch.randn(2, 5, 2, 3, 4) * 7 + 3
    y = ChannelNorm(5)(x)
    expected = (x - x.mean(1, keepdim=True)) / torch.sqrt(x.var(1, unbiased=False, keepdim=True) + 1e-6)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)


def test_token_maps_are_laid_out_in_c_order() -> None:
    tokens = torch.arange(48.0)[None, :, None]
    assert torch.equal(as_map(tokens, (4, 6, 2))[0, 0], torch.arange(48.0).reshape(4, 6, 2))


def test_default_widths_fall_to_sixteen() -> None:
    assert default_decoder_widths(864, 3) == [232, 64, 16]  # 864 * (16/864)^(1/3) = 228.6, ^(2/3) = 60.5
    assert default_decoder_widths(144, 2) == [48, 16]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"eva_numheads": 5}, "multiple of 6"),
        ({"embed_dim": 32, "eva_numheads": 2}, "multiple of 6"),
        ({"strides": [[2, 2, 2], [2, 2, 2]]}, "first must be ones"),
        ({"strides": [[1, 1, 1], [16, 16, 16]]}, "16x24x8"),
        ({"decoder_widths": [8]}, "decoder_widths"),
    ],
)
def test_sizes_that_do_not_fit_are_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(NnsslError, match=words):
        our_primus(**settings)


def test_an_input_that_the_token_does_not_divide_is_named() -> None:
    with pytest.raises(NnsslError, match="10x8x8 voxels"):
        our_primus()(torch.zeros(1, 1, 10, 8, 8))
