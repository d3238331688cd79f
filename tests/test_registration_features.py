"""Features of a pair: normalisation as in training, joint basis, fusion, and whose weights they are."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from checkpoint_helpers import content_of, plans_of, primus, resenc

from nnssl_ext.checkpoints.io import save_checkpoint
from nnssl_ext.errors import NnsslError
from nnssl_ext.networks.build import build_network
from nnssl_ext.registration.encoder import load_encoder, random_encoder
from nnssl_ext.registration.extraction import FeatureMap
from nnssl_ext.registration.features import files_of, load_features, pair_features, parts_of, working_spacing
from nnssl_ext.registration.frame import Turn
from nnssl_ext.registration.projection import fuse, joint_pca

CPU = torch.device("cpu")


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def whole(values: torch.Tensor) -> tuple[FeatureMap, torch.Tensor]:
    return FeatureMap(values, (1.0, 1.0, 1.0), (0.0, 0.0, 0.0)), torch.ones(values.shape[1:], dtype=torch.bool)


class TestJointBasis:
    def test_it_is_the_principal_basis_of_the_foreground_of_both(self):
        """Against scikit-learn on the stacked foreground features."""
        from sklearn.decomposition import PCA

        mixing = noise(20, 20, seed=9)
        maps = [whole(torch.einsum("dc,czyx->dzyx", mixing, noise(20, 6, 5, 4, seed=s)) + 3)[0] for s in (1, 2)]
        masks = [noise(6, 5, 4, seed=s) > 0 for s in (3, 4)]
        stacked = torch.cat([m.values[:, mask] for m, mask in zip(maps, masks, strict=True)], dim=1).T
        expected = PCA(5, svd_solver="full").fit(stacked.double().numpy())
        found = joint_pca(*maps, *masks, components=5)
        for before, after in zip(maps, found, strict=True):
            scores = expected.transform(before.values.flatten(1).T.double().numpy()).T
            ours = after.values.flatten(1).numpy()
            signs = np.sign((scores * ours).sum(axis=1, keepdims=True))
            assert np.allclose(ours * signs, scores, atol=1e-3)

    def test_few_channels_are_centred_only(self):
        (a, mask), (b, _) = whole(noise(3, 4, 4, 4) + 5), whole(noise(3, 4, 4, 4, seed=1) + 5)
        first, second = joint_pca(a, b, mask, mask, components=12)
        mean = (a.values.mean(dim=(1, 2, 3)) + b.values.mean(dim=(1, 2, 3))) / 2
        assert torch.allclose(first.values, a.values - mean[:, None, None, None], atol=1e-5)
        assert torch.allclose(second.values, b.values - mean[:, None, None, None], atol=1e-5)

    def test_signs_are_those_of_the_largest_loadings_whatever_the_library_says(self, monkeypatch):
        (a, mask), (b, _) = whole(noise(6, 4, 4, 4)), whole(noise(6, 4, 4, 4, seed=1))
        first, _ = joint_pca(a, b, mask, mask, components=3)
        eigh = torch.linalg.eigh
        monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: (eigh(matrix)[0], -eigh(matrix)[1]))
        again, _ = joint_pca(a, b, mask, mask, components=3)
        assert torch.equal(first.values, again.values)

    def test_distances_survive_a_full_basis(self):
        (a, mask), (b, _) = whole(noise(6, 4, 4, 4)), whole(noise(6, 4, 4, 4, seed=1))
        first, second = joint_pca(a, b, mask, mask, components=5)
        assert (first.values - second.values).square().sum() < (a.values - b.values).square().sum()


class TestFusion:
    def blocks(self):
        """A block of 2 channels and a loud one of 10."""
        return [
            (noise(2, 8, 8, 8, seed=1), noise(2, 8, 8, 8, seed=2)),
            (100 * noise(10, 8, 8, 8, seed=3), 100 * noise(10, 8, 8, 8, seed=4)),
        ]

    @pytest.mark.parametrize(("weights", "share"), [((1.0, 1.0), 0.5), ((3.0, 1.0), 0.75)])
    def test_blocks_contribute_by_weight(self, weights, share):
        mask = torch.ones(8, 8, 8, dtype=torch.bool)
        fixed, moving = fuse(self.blocks(), weights, mask, mask)
        cost = (fixed - moving).square().mean(dim=(1, 2, 3))  # noise: each place is unrelated to its partner
        assert len(fixed) == 12
        assert float(cost[:2].sum() / cost.sum()) == pytest.approx(share, abs=0.05)
        assert float(cost.mean()) == pytest.approx(1.0, abs=0.1)

    def test_blocks_of_volumes_that_differ_throughout_contribute_no_more(self):
        blocks = [
            (noise(2, 6, 6, 6, seed=1), noise(2, 6, 6, 6, seed=2) + 5),
            (noise(3, 6, 6, 6, seed=3), noise(3, 6, 6, 6, seed=4)),
        ]
        mask = torch.ones(6, 6, 6, dtype=torch.bool)
        a, b = (side.flatten(1) for side in fuse(blocks, (1.0, 1.0), mask, mask))
        apart = (a[:, :, None] - b[:, None]).square().mean((1, 2))  # every place with every other
        assert apart.mean().item() == pytest.approx(1, rel=1e-3)
        assert (apart[:2].sum() / apart.sum()).item() == pytest.approx(0.5, rel=1e-3)

    def test_one_block_stays_as_it_is_and_weight_0_drops_one(self):
        mask, blocks = torch.ones(8, 8, 8, dtype=torch.bool), self.blocks()
        assert fuse(blocks[:1], [0.3], mask, mask)[0] is blocks[0][0]
        assert len(fuse(blocks, [1.0, 0.0], mask, mask)[0]) == 2
        for wrong in ([1.0], [0.0, 0.0], [1.0, -1.0]):
            with pytest.raises(NnsslError, match="weight"):
                fuse(blocks, wrong, mask, mask)


@pytest.fixture(params=["primus", "resenc"])
def checkpoint(request, tmp_path):
    architecture = primus([16, 16, 16]) if request.param == "primus" else resenc()
    path = tmp_path / f"{request.param}.pth"
    save_checkpoint(path, content_of(plans_of(architecture, [16, 16, 16])))
    return path


class TestNetworks:
    def test_a_checkpoint_gives_its_own_weights(self, checkpoint):
        encoder = load_encoder(checkpoint, CPU)
        saved = torch.load(checkpoint, weights_only=True)["network_weights"]
        loaded = encoder.backbone.network.state_dict()
        kept = [key for key in loaded if key.startswith(encoder.backbone.encoder_prefixes)]
        assert kept and all(torch.equal(loaded[key], saved[key]) for key in kept)
        assert "MAETrainer" in encoder.weights and encoder.spacing == (1.0, 1.0, 1.0)
        assert not encoder.backbone.network.training
        assert not any(p.requires_grad for p in encoder.backbone.network.parameters())

    def test_random_weights_are_the_same_network_and_follow_the_seed(self, checkpoint, tmp_path):
        plans = tmp_path / "plans.json"
        plans.write_text(json.dumps(plans_of(primus([16, 16, 16]), [16, 16, 16])))
        for path in (checkpoint, plans):
            encoders = [random_encoder(path, CPU, seed) for seed in (0, 0, 1)]
            first, again, other = (torch.cat([p.flatten() for p in e.backbone.network.parameters()]) for e in encoders)
            assert torch.equal(first, again) and not torch.equal(first, other)
        trained = load_encoder(checkpoint, CPU).backbone.network.state_dict()
        random = random_encoder(checkpoint, CPU).backbone.network.state_dict()
        assert {k: v.shape for k, v in trained.items()} == {k: v.shape for k, v in random.items()}

    def test_scans_are_normalised_as_nnunet_does(self, checkpoint):
        """Against nnU-Net's own preprocessor, a scan with an empty rim included."""
        from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

        raw = np.zeros((12, 14, 16), np.float32)
        raw[2:11, 3:12, 1:15] = 300 + 40 * np.random.default_rng(0).normal(size=(9, 9, 14))
        plans = torch.load(checkpoint, weights_only=True)["nnssl_ext"]["plans"]
        resampling = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
        plans["configurations"]["3d_fullres"] |= {
            "resampling_fn_data": "resample_data_or_seg_to_shape",
            "resampling_fn_data_kwargs": resampling,
            "resampling_fn_seg": "resample_data_or_seg_to_shape",
            "resampling_fn_seg_kwargs": resampling,
        }
        manager = PlansManager(plans)
        expected, _, properties = DefaultPreprocessor(verbose=False).run_case_npy(
            raw[None], None, {"spacing": [1.0, 1.0, 1.0]}, manager, manager.get_configuration("3d_fullres"), {}
        )
        found = load_encoder(checkpoint, CPU).normalise(raw)
        box = tuple(slice(*edge) for edge in properties["bbox_used_for_cropping"])
        assert found.shape == raw.shape and np.allclose(found[box], expected[0], atol=1e-5)
        assert (found[0] == found[2]).all()  # the crop's border goes on

    def test_axes_that_the_plans_turn_are_turned_back(self, tmp_path):
        """A network whose first axis is x sees the scan so, and its features come back on the scan's axes."""
        plain, turned = tmp_path / "plain.pth", tmp_path / "turned.pth"
        plans = plans_of(primus([16, 16, 16]), [16, 16, 16])
        content = content_of(plans)
        save_checkpoint(plain, content)
        theirs = content["nnssl_ext"]["plans"]
        theirs |= {"transpose_forward": [2, 0, 1], "transpose_backward": [1, 2, 0]}
        theirs["configurations"]["3d_fullres"]["spacing"] = [3.0, 1.0, 2.0]
        save_checkpoint(turned, content)
        (reference,), (source,) = (load_features(str(path), CPU) for path in (plain, turned))
        assert source.spacing == (1.0, 2.0, 3.0)
        volume = noise(8, 12, 16)
        expected = reference.describe(volume.permute(2, 0, 1), (3.0, 1.0, 2.0)).values
        assert torch.equal(source.describe(volume, (1.0, 2.0, 3.0)).values, expected.permute(0, 2, 3, 1))

    def test_several_channels_become_one(self, tmp_path):
        path = tmp_path / "two.pth"
        plans = plans_of(primus([16, 16, 16]), [16, 16, 16])
        plans["configurations"]["3d_fullres"]["normalization_schemes"] = ["ZScoreNormalization"] * 2
        plans["configurations"]["3d_fullres"]["use_mask_for_norm"] = [False] * 2
        save_checkpoint(path, content_of(plans, input_channels=2))
        encoder = load_encoder(path, CPU)
        assert any("2 channels" in note for note in encoder.notes)
        saved = torch.load(path, weights_only=True)["network_weights"]["down_projection.proj.weight"]
        kernel = encoder.backbone.network.state_dict()["down_projection.proj.weight"]
        assert torch.allclose(kernel, saved.sum(dim=1, keepdim=True), atol=1e-6)

    @pytest.mark.parametrize("architecture", [primus([16, 16, 16]), resenc()], ids=["primus", "resenc"])
    def test_labels_are_what_nnunets_network_makes_of_the_scan(self, tmp_path, architecture):
        path, plans = tmp_path / "nnunet.pth", plans_of(architecture, [16, 16, 16])
        torch.manual_seed(3)
        network = build_network(plans, "3d_fullres", 1, 4).eval()
        labels = {"background": 0, "a": 1, "b": 2, "c": 3}
        arguments = {"plans": plans, "configuration": "3d_fullres", "dataset_json": {"labels": labels}}
        content = {"network_weights": network.state_dict(), "init_args": arguments, "trainer_name": "nnUNetTrainer"}
        torch.save(content, path)
        (source,) = load_features(f"{path}@labels", CPU)
        volume = noise(16, 32, 16)
        with torch.no_grad():
            expected = network(volume[None, None])[0].softmax(dim=0)
        found = source.describe(volume, (1.0, 1.0, 1.0))
        torch.testing.assert_close(found.on_grid((16, 32, 16)), expected)
        assert source.components is None and found.values.std(dim=(1, 2, 3)).min() > 1e-4
        arguments["dataset_json"] = {"labels": {"background": 0, "whole": [1, 2], "core": 2}}
        torch.save(content, path)
        with pytest.raises(NnsslError, match="labels that exclude each other"):
            load_features(f"{path}@labels", CPU)

    def test_what_cannot_be_used_is_named(self, tmp_path, checkpoint):
        content = torch.load(checkpoint, weights_only=True)
        prefixes = load_encoder(checkpoint, CPU).backbone.encoder_prefixes
        bare = {key: value for key, value in content["network_weights"].items() if not key.startswith(prefixes)}
        save_checkpoint(tmp_path / "bare.pth", {**content, "network_weights": bare})
        with pytest.raises(NnsslError, match=r"bare\.pth lacks \d+ weights of the encoder"):
            load_encoder(tmp_path / "bare.pth", CPU)
        torch.save({"state_dict": {}}, tmp_path / "foreign.pth")
        with pytest.raises(NnsslError, match=r"foreign\.pth is no checkpoint"):
            load_encoder(tmp_path / "foreign.pth", CPU)
        untrained = [key for key in content["network_weights"] if key.startswith("decoder.")]
        content["nnssl_ext"]["not_pretrained"] = [key for key in untrained if not key.startswith("decoder.encoder.")]
        save_checkpoint(tmp_path / "encoder_only.pth", content)
        with pytest.raises(NnsslError, match="left the decoder untouched"):
            load_features(f"{tmp_path / 'encoder_only.pth'}@decoder0", CPU)
        with pytest.raises(NnsslError, match="did not teach it labels"):
            load_features(f"{tmp_path / 'encoder_only.pth'}@labels", CPU)
        with pytest.raises(NnsslError, match="no feature 'mint'"):
            load_features("mint", CPU)
        with pytest.raises(NnsslError, match="holds no plans"):
            (tmp_path / "x.json").write_text("{}")
            load_features(f"random:{tmp_path / 'x.json'}", CPU)


def test_fused_features_of_a_pair(checkpoint):
    sources = load_features(f"{checkpoint}@encoder0+mind+intensity", CPU)
    assert working_spacing(sources) == (1.0, 1.0, 1.0)
    raw = [np.random.default_rng(seed).normal(size=(12, 13, 14)).astype(np.float32) for seed in (0, 1)]
    inside = np.ones(raw[0].shape, bool)
    volumes = [tuple(source.normalise(volume, inside) for volume in raw) for source in sources]
    mask = torch.from_numpy(inside)
    fixed, moving = pair_features(sources, volumes, (1.0, 1.0, 1.0), mask, mask)
    assert fixed.shape == moving.shape and fixed.shape[1:] == (12, 13, 14)
    assert fixed.isfinite().all() and moving.isfinite().all()


@pytest.mark.parametrize("turn", [Turn((2, 0, 1), (1,)), Turn((1, 0, 2), (0, 2))], ids=str)
def test_a_network_sees_scans_as_they_were_loaded_whatever_the_frame(checkpoint, turn):
    """Spacings, volumes and foregrounds are turned back for it, its features turned into the frame."""
    rng = np.random.default_rng(0)
    shape = (16, 24, 20)
    volumes = rng.normal(size=(2, *shape)).astype(np.float32)
    masks = [torch.from_numpy(rng.random(shape) > 0.3) for _ in range(2)]
    sources = load_features(str(checkpoint), torch.device("cpu"))
    assert sources[0].oriented
    spacing = (1.0, 2.0, 3.0)
    loaded = pair_features(sources, [(volumes[0], volumes[1])], spacing, *masks)
    there = [turn.there(torch.from_numpy(volume)).numpy() for volume in volumes]
    framed = pair_features(
        sources,
        [(there[0], there[1])],
        turn.lengths_there(spacing),
        turn.there(masks[0]),
        turn.there(masks[1]),
        turn=turn,
    )
    for one, other in zip(loaded, framed, strict=True):
        assert torch.equal(turn.there(one), other)


def test_paths_may_hold_what_joins_and_what_begins_a_level(tmp_path):
    path = tmp_path / "me@home" / "a+b@c" / "last@2.pth"
    path.parent.mkdir(parents=True)
    save_checkpoint(path, content_of(plans_of(primus([16, 16, 16]), [16, 16, 16])))
    for part, level in ((f"{path}", ""), (f"{path}@encoder0", "encoder0"), (f"random:{path}@encoder0", "encoder0")):
        for text in (part, f"mind+{part} + intensity", f"{part}+{part}"):
            assert part in parts_of(text) and set(files_of(text)) == {path}
        (source,) = load_features(part, CPU)
        assert source.extraction.level == level
    assert parts_of("last.pth@encoder1+mind") == ["last.pth@encoder1", "mind"]
    with pytest.raises(NnsslError, match="no feature"):
        load_features(f"{path}x@encoder0", CPU)


def test_networks_of_different_spacings_do_not_fuse(tmp_path):
    names = []
    for edge in (1.0, 2.0):
        plans = plans_of(primus([16, 16, 16]), [16, 16, 16])
        plans["configurations"]["3d_fullres"]["spacing"] = [edge] * 3
        names.append(str(tmp_path / f"{edge}.pth"))
        save_checkpoint(names[-1], content_of(plans))
    with pytest.raises(NnsslError, match="different spacings"):
        working_spacing(load_features("+".join(names), CPU))
