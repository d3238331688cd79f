"""A probe as a whole: features that hold the answer score high and shuffled labels do not, the network stays as it is, cases
are split as said, and what the pretraining saw is named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import blosc2
import numpy as np
import pytest
import torch
from checkpoint_helpers import content_of, nnssl_checkpoint, plans_of, resenc
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from scipy.ndimage import distance_transform_edt
from torch import nn
from torch.nn import functional

from nnssl_ext.checkpoints.io import save_checkpoint
from nnssl_ext.checkpoints.provenance import patch_name, runs_behind, training_cases
from nnssl_ext.data.cases import list_cases
from nnssl_ext.errors import NnsslError
from nnssl_ext.files import write_json
from nnssl_ext.networks.build import build_network
from nnssl_ext.probing.arms import Neighbourhoods, describer, fingerprint, frozen
from nnssl_ext.probing.cases import Labels, ProbeData, split_cases
from nnssl_ext.probing.run import measure
from nnssl_ext.probing.scores import score
from nnssl_ext.probing.settings import ProbeSettings
from nnssl_ext.probing.summary import leaks_of
from nnssl_ext.records import Case
from nnssl_ext.registration.encoder import Source, read_source, trained_encoder, untrained_encoder
from nnssl_ext.registration.extraction import FeatureMap

CPU = torch.device("cpu")
QUICK = ProbeSettings(voxels=1200, neighbours_of=1200, iterations=100, batch_size=256, width=16, controls=1)
NAMES = [f"c{number:02d}" for number in range(20)]


def write_cases(folder, shuffle: bool = False) -> ProbeData:
    """Cases whose image is their label map (two balls) and, with `shuffle`, labels that lie anywhere."""
    folder.mkdir(parents=True)
    for number in range(6):
        rng = np.random.default_rng(number)
        z, y, x = np.ogrid[:18, :20, :16]
        labels = np.zeros((18, 20, 16), np.int8)
        for value, middle in ((1, 6), (2, 13)):
            centre = rng.uniform(-1, 1, 3) + np.array([9, middle, 8])
            labels[(z - centre[0]) ** 2 + (y - centre[1]) ** 2 + (x - centre[2]) ** 2 < 10] = value
        truth = rng.permutation(labels.ravel()).reshape(labels.shape) if shuffle else labels
        properties = {"spacing": [1.0, 1.0, 1.0]}
        nnUNetDatasetBlosc2.save_case(
            labels[None].astype(np.float32), truth[None], properties, str(folder / f"c{number}")
        )
    cases = list_cases(folder, (1.0, 1.0, 1.0))
    labels = Labels(3, {"front": 1, "back": 2}, None)
    return ProbeData("D", "P", "3d_fullres", labels, tuple(cases[:3]), tuple(cases[3:]), "")


def knows(volume: torch.Tensor) -> list[FeatureMap]:
    """The labels, one channel each, at the voxels, and nothing on a coarser level."""
    size = tuple(volume.shape[1:])
    hot = functional.one_hot(volume[0].long(), 3).movedim(-1, 0).float()
    return [FeatureMap.over(size, hot), FeatureMap.over(size, torch.zeros(2, *(n // 2 for n in size)))]


def foreground_dice(result) -> dict[str, float]:
    return {
        head: float(np.mean([each["dice"] for scores in cases.values() for each in scores.values()]))
        for head, cases in result.scores.items()
    }


def test_features_that_hold_the_label_give_it_back_and_shuffled_labels_do_not(tmp_path):
    right = foreground_dice(measure(knows, write_cases(tmp_path / "a"), QUICK, 0, CPU, "t"))
    assert right.keys() == {"linear", "non-linear", "kNN"} and min(right.values()) > 0.99
    wrong = foreground_dice(measure(knows, write_cases(tmp_path / "b", shuffle=True), QUICK, 0, CPU, "t"))
    assert max(wrong.values()) < 0.2


def test_one_class_in_the_cases_that_teach_is_named(tmp_path):
    data = write_cases(tmp_path / "a")
    for case in data.train:
        path = case.folder / f"{case.identifier}_seg.b2nd"
        path.unlink()
        blosc2.asarray(np.zeros((1, *case.shape), np.int8), urlpath=str(path))
    with pytest.raises(NnsslError, match="hold only label 0"):
        measure(knows, data, QUICK, 0, CPU, "t")


def test_a_label_that_is_not_listed_is_named(tmp_path):
    data = replace(write_cases(tmp_path / "a"), labels=Labels(2, {"front": 1}, None))
    with pytest.raises(NnsslError, match="case c0 has label 2, which dataset"):
        measure(knows, data, QUICK, 0, CPU, "t")


class TestFrozen:
    def plans(self):
        """A network with batch norms, whose statistics are buffers that would move in training mode."""
        network = resenc(norm_op="torch.nn.modules.batchnorm.BatchNorm3d")
        return plans_of(network, [16, 16, 16])

    @pytest.mark.parametrize("pyramid", ["encoder", "decoder"])
    def test_weights_and_buffers_stay_bit_identical(self, tmp_path, pyramid):
        save_checkpoint(tmp_path / "c.pth", content_of(self.plans()))
        encoder = trained_encoder(read_source(tmp_path / "c.pth"), CPU)
        module = encoder.backbone
        assert any("running_var" in name for name, _ in module.named_buffers())
        before = {key: value.clone() for key, value in module.state_dict().items()}
        digest = fingerprint(module)
        settings = ProbeSettings(pyramid=pyramid, voxels=300, neighbours_of=300, iterations=5, width=8)
        with frozen(encoder):
            result = measure(describer(encoder, settings), write_cases(tmp_path / "a"), settings, 0, CPU, "t")
        after = module.state_dict()
        assert all(torch.equal(before[key], after[key]) for key in before) and fingerprint(module) == digest
        assert not any(parameter.grad is not None for parameter in module.parameters())
        assert result.channels == 24

    def test_a_change_does_not_go_unnoticed(self, tmp_path):
        save_checkpoint(tmp_path / "c.pth", content_of(self.plans()))
        source = read_source(tmp_path / "c.pth")
        for change in ("weight", "buffer", "mode"):
            encoder = untrained_encoder(source, CPU, 0)
            module = encoder.backbone
            norm = next(part for part in module.modules() if isinstance(part, nn.BatchNorm3d))
            with pytest.raises(RuntimeError, match="probing changed"), frozen(encoder):
                if change == "mode":
                    norm.train()
                else:
                    (norm.weight.data if change == "weight" else norm.running_mean)[0] += 1e-7

    def test_a_decoder_that_was_not_trained_is_refused(self, tmp_path):
        save_checkpoint(
            tmp_path / "c.pth", content_of(self.plans(), pretrained_prefixes=("encoder.", "decoder.encoder."))
        )
        encoder = trained_encoder(read_source(tmp_path / "c.pth"), CPU)
        with pytest.raises(NnsslError, match="decoder untouched"):
            describer(encoder, ProbeSettings(pyramid="decoder"))


def test_intensities_are_those_around_the_voxel():
    volume = torch.randn(2, 5, 6, 7, generator=torch.Generator().manual_seed(0))
    inside, corner = Neighbourhoods.of(volume).at(torch.tensor([[2, 3, 4], [0, 5, 0]]))
    assert len(inside) == 54
    assert torch.equal(inside.view(3, 3, 3, 2).movedim(-1, 0), volume[:, 1:4, 2:5, 3:6])
    repeated = volume[:, [0, 0, 1]][:, :, [4, 5, 5]][:, :, :, [0, 0, 1]]
    assert torch.equal(corner.view(3, 3, 3, 2).movedim(-1, 0), repeated)


class TestSplit:
    def test_seeded_disjoint_nested_and_complete(self):
        split = split_cases(NAMES, 5, 6, 1)
        assert split == split_cases(NAMES[::-1], 5, 6, 1) != split_cases(NAMES, 5, 6, 2)
        assert len(split.train) == 5 and len(split.test) == 6 and not set(split.train) & set(split.test)
        more = split_cases(NAMES, 14, 6, 1)
        assert more.test == split.test and set(split.train) < set(more.train)
        assert split_cases(NAMES, 5, 15, 1).train == split.train
        default = split_cases(NAMES, None, None, 0)
        assert len(default.train) == len(default.test) == 10

    def test_a_fold_keeps_its_sides(self):
        fold = ("fold 0", {"train": NAMES[:15], "val": [*NAMES[15:], "not preprocessed"]})
        split = split_cases(NAMES, None, None, 0, fold)
        assert set(split.train) == set(NAMES[:15]) and set(split.test) == set(NAMES[15:])
        fewer = split_cases(NAMES, 3, 2, 0, fold)
        assert set(fewer.train) < set(NAMES[:15]) and set(fewer.test) < set(NAMES[15:])
        with pytest.raises(NnsslError, match="both sides: c14"):
            split_cases(NAMES, None, None, 0, ("fold 0", {"train": NAMES[:15], "val": NAMES[14:]}))

    @pytest.mark.parametrize(("train", "test"), [(15, 6), (0, 5), (5, 1), (None, 21)])
    def test_too_few_cases_are_named(self, train, test):
        with pytest.raises(NnsslError, match="of 20 cases"):
            split_cases(NAMES, train, test, 0)
        with pytest.raises(NnsslError, match=r"of 3 \+ 2 cases of fold 0"):
            split_cases(NAMES, 4, 2, 0, ("fold 0", {"train": NAMES[:3], "val": NAMES[3:5]}))
        with pytest.raises(NnsslError, match="--seed -1"):
            split_cases(NAMES, 4, 2, -1)


class TestScores:
    def volumes(self):
        truth, answer = np.zeros((2, 10, 8, 12), np.int16)
        truth[2:6, 2:6, 2:6], truth[7:9, 1:4, 1:4] = 1, 2
        answer[3:7, 2:6, 2:6], answer[0, 0, 0] = 1, 3
        return truth, answer

    def test_dice_and_distance_by_hand(self):
        truth, answer = self.volumes()
        found = score(truth, answer, Labels(5, {"a": 1, "b": 2, "c": 3, "d": 4}, None), (2.0, 1.0, 1.0))
        assert found["a"]["dice"] == pytest.approx(2 * 48 / 128)
        assert found["a"]["hd95_mm"] == pytest.approx(2.0)  # one slice of 2 mm
        diagonal = np.linalg.norm((20, 8, 12))
        assert found["b"] == {"dice": 0.0, "hd95_mm": pytest.approx(diagonal)}  # missed
        assert found["c"] == {"dice": 0.0, "hd95_mm": pytest.approx(diagonal)}  # made up
        assert np.isnan(found["d"]["dice"]) and np.isnan(found["d"]["hd95_mm"])

    def test_regions_and_ignored_voxels(self):
        truth, answer = self.volumes()
        truth[:3] = 4  # ignored: one slice of the first box
        found = score(truth, answer, Labels(4, {"both": (1, 2), "a": 1}, 4), (1.0, 1.0, 1.0))
        assert found["a"]["dice"] == pytest.approx(2 * 48 / (48 + 64))
        assert found["both"]["dice"] == pytest.approx(2 * 48 / (48 + 18 + 64))
        outside = distance_transform_edt(truth != 1)
        assert found["a"]["hd95_mm"] <= outside[answer == 1].max()

    def test_what_is_answered_in_ignored_voxels_changes_nothing(self):
        truth, answer = self.volumes()
        truth[:, :, 8:] = 4  # ignored: six columns or more from the first box
        labels = Labels(4, {"a": 1, "b": 2, "c": 3}, 4)
        expected = score(truth, answer, labels, (1.0, 1.0, 1.0))
        assert expected["a"]["hd95_mm"] == pytest.approx(1.0)  # moved by a slice
        answer[:, :, 8:] = 1
        assert score(truth, answer, labels, (1.0, 1.0, 1.0)) == expected


class TestWhatPretrainingSaw:
    def checkpoint(self, folder, cases, **run):
        folder.mkdir()
        save_checkpoint(folder / "c.pth", content_of(plans_of(resenc(), [16, 16, 16])))
        if cases is not None:
            write_json(folder / "settings.json", {"dataset": "Dataset004_Hippocampus", "cases": cases, "run": run})
        return folder / "c.pth"

    def data(self) -> ProbeData:
        cases = tuple(Case(name, Path(), 1, (9, 9, 9), (1.0, 1.0, 1.0)) for name in NAMES)
        return ProbeData("D", "P", "C", Labels(2, {"a": 1}, None), cases[:10], cases[10:], "")

    def test_scored_cases_of_the_run_are_named(self, tmp_path):
        leaks = leaks_of(read_source(self.checkpoint(tmp_path / "run", ["c03", "c12", "c17"])), self.data())
        assert len(leaks) == 1 and leaks[0].startswith("2 of 10 scored cases") and leaks[0].endswith("c12, c17")
        assert leaks_of(read_source(self.checkpoint(tmp_path / "clean", ["c03"])), self.data()) == []

    def test_so_are_those_of_the_runs_before(self, tmp_path):
        first = self.checkpoint(tmp_path / "first", ["c11"])
        second = self.checkpoint(tmp_path / "second", ["c01"], pretrained_weights=str(first))
        assert [run.cases for run in runs_behind(second)[0]] == [{"c01"}, {"c11"}]
        (leak,) = leaks_of(read_source(second), self.data())
        assert leak.endswith(": c11")
        (first.parent / "settings.json").unlink()
        (leak,) = leaks_of(read_source(second), self.data())
        assert str(first) in leak and "may have been" in leak

    def test_crops_are_of_the_cases_they_were_cut_from(self, tmp_path):
        run = self.checkpoint(tmp_path / "run", [patch_name("c12", 0), patch_name("c12", 1000), "c17_p1"])
        (leak,) = leaks_of(read_source(run), self.data())
        assert leak.startswith("1 of 10 scored cases") and leak.endswith("(without labels): c12")

    def test_whether_labels_were_seen_too(self, tmp_path):
        run = self.checkpoint(tmp_path / "run", ["c12"])
        settings = {"dataset": "Dataset004_Hippocampus", "cases": ["c12"], "settings": {"labels": [1, 2]}}
        write_json(run.parent / "settings.json", settings)
        (leak,) = leaks_of(read_source(run), self.data())
        assert leak.endswith("(with their labels): c12")
        later = self.checkpoint(tmp_path / "later", ["c17"], pretrained_weights=str(run))
        (leak,) = leaks_of(read_source(later), self.data())
        assert leak.endswith("(with their labels): c12, c17")

    def test_a_run_before_that_is_named_by_a_relative_path_is_not_looked_for_here(self, tmp_path, monkeypatch):
        later = self.checkpoint(tmp_path / "later", ["c01"], pretrained_weights="c.pth")
        monkeypatch.chdir(later.parent)  # where another c.pth lies
        (leak,) = leaks_of(read_source(Path("c.pth")), self.data())
        assert "beside c.pth" in leak and "may have been" in leak

    def test_what_is_not_recorded_is_said(self, tmp_path):
        (leak,) = leaks_of(read_source(self.checkpoint(tmp_path / "alone", None)), self.data())
        assert "200 cases of Dataset004_Hippocampus" in leak and "may have been among them" in leak
        foreign = self.checkpoint(tmp_path / "foreign", [])
        write_json(foreign.parent / "settings.json", {"dataset": "Dataset001_Other", "cases": ["c12"]})
        (leak,) = leaks_of(read_source(foreign), self.data())
        assert "may have been" in leak  # settings of some other run

    def test_nnssl_lists_its_images(self, tmp_path):
        plans = plans_of(resenc(), [16, 16, 16])
        network = build_network(plans, "3d_fullres", 1, 1)
        content = nnssl_checkpoint("ResidualEncoderUNet", network, [16, 16, 16], resenc()["arch_kwargs"])
        assert "does not list" in training_cases(tmp_path / "x.pth", content).unrecorded[0]
        images = [
            {"name": "x", "image_path": f"$nnssl_raw/d/{name}"} for name in ("c12_0000.nii.gz", "c05.nrrd", "z.1.nii")
        ]
        subject = {"sessions": {"ses-1": {"images": images}}}
        content["init_args"]["pretrain_json"] = {"datasets": {"d": {"subjects": {"s": subject}}}}
        save_checkpoint(tmp_path / "n.pth", content)
        source = read_source(tmp_path / "n.pth")
        assert isinstance(source, Source) and source.learned_from.seen == {"c12", "c05", "z.1"}
        (leak,) = leaks_of(source, self.data())
        assert leak.endswith(": c12") and "SECRET" not in json.dumps(leak)
