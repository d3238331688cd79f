"""Parts of the registration benchmark: pairs without leaks, matched smoothness, classical fields, landmarks, costs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from checkpoint_helpers import content_of, plans_of, primus
from scans import write
from scipy.ndimage import gaussian_filter

from nnssl_ext.checkpoints.io import save_checkpoint
from nnssl_ext.errors import NnsslError
from nnssl_ext.files import read_json, write_json
from nnssl_ext.networks.build import build_network
from nnssl_ext.registration.benchmark.cells import landmark_error
from nnssl_ext.registration.benchmark.classical import CLASSICAL
from nnssl_ext.registration.benchmark.meter import metered
from nnssl_ext.registration.benchmark.methods import Method, parse_methods, untrained_identity, with_controls
from nnssl_ext.registration.benchmark.pairs import Split, cases_of, dataset_pairs, learn2reg_pairs, split_cases
from nnssl_ext.registration.benchmark.selection import BEYOND, Curve, best
from nnssl_ext.registration.features import Intensity
from nnssl_ext.registration.images import load_scan
from nnssl_ext.registration.outputs import _overlap
from nnssl_ext.registration.pipeline import PairSettings, describe_pair
from nnssl_ext.registration.warp import warp

CPU = torch.device("cpu")


class TestPairs:
    def dataset(self, folder: Path, cases: int, unlabelled: int = 0) -> Path:
        write_json(folder / "dataset.json", {"file_ending": ".nii.gz"})
        for number in range(cases + unlabelled):
            for kind, name in (("imagesTr", f"case_{number:02}_0000"), ("labelsTr", f"case_{number:02}")):
                (folder / kind).mkdir(exist_ok=True)
                if kind == "imagesTr" or number < cases:
                    (folder / kind / f"{name}.nii.gz").touch()
        return folder

    def test_the_protocol_takes_the_last_cases_and_pairs_neighbours(self, tmp_path):
        split = dataset_pairs(self.dataset(tmp_path, 8, unlabelled=2), 3, 4, None)
        assert [pair.cases for pair in split.development] == [("case_01", "case_02"), ("case_02", "case_03")]
        assert [pair.cases for pair in split.test] == [(f"case_0{n}", f"case_0{n + 1}") for n in (4, 5, 6)]
        first = split.test[0]
        assert first.name == "case_05_to_case_04" and first.files.fixed.name == "case_04_0000.nii.gz"
        assert first.files.moving_labels and first.files.moving_labels.name == "case_05.nii.gz"

    @pytest.mark.parametrize("seed", range(5))
    def test_no_case_is_on_both_sides_whatever_the_seed(self, seed):
        names = [f"c{n:03}" for n in range(50)]
        development, test = split_cases(names, 16, 30, seed)
        assert len(development) == 16 and len(test) == 30 and not set(development) & set(test)
        assert (development, test) == split_cases(names[::-1], 16, 30, seed)
        assert test != split_cases(names, 16, 30, seed + 1)[1]

    def test_too_few_cases_are_named(self, tmp_path):
        with pytest.raises(NnsslError, match="6 development and 4 test cases of 8"):
            dataset_pairs(self.dataset(tmp_path, 8), 6, 4, 0)
        with pytest.raises(NnsslError, match="no case with image and label"):
            dataset_pairs(self.dataset(tmp_path / "other", 0, unlabelled=3), 2, 2, 0)

    def test_a_split_that_leaks_cannot_be_made(self, tmp_path):
        split = dataset_pairs(self.dataset(tmp_path, 8), 3, 4, 0)
        with pytest.raises(NnsslError, match="are in development and in test pairs"):
            Split(split.test, split.test, "the same twice")

    def task(self, folder: Path, **parts) -> Path:
        """Subjects 1-3 train, 4 and 5 validate, 6 and 7 test without labels; two time points each, with landmarks for 4."""
        for subject in range(1, 8):
            for time in (0, 1):
                name = f"Task_{subject:04}_{time:04}"
                for kind, suffix in (("images", ".nii.gz"), ("labels", ".nii.gz"), ("landmarks", ".csv")):
                    wanted = {"images": True, "labels": subject < 6, "landmarks": subject == 4}[kind]
                    place = folder / f"{kind}{'Ts' if subject > 5 else 'Tr'}" / f"{name}{suffix}"
                    place.parent.mkdir(exist_ok=True, parents=True)
                    if wanted:
                        place.touch()

        def image(subject: int, time: int) -> str:
            return f"./images{'Ts' if subject > 5 else 'Tr'}/Task_{subject:04}_{time:04}.nii.gz"

        def pairs(*subjects: int) -> list[dict[str, str]]:
            return [{"fixed": image(subject, 0), "moving": image(subject, 1)} for subject in subjects]

        content = {
            "name": "Task",
            "training": [{"image": image(subject, time)} for subject in (1, 2, 3, 4, 5) for time in (0, 1)],
            "registration_val": pairs(4, 5),
            "registration_test": pairs(6, 7),
            **{part: pairs(*subjects) for part, subjects in parts.items()},
        }
        write_json(folder / "Task_dataset.json", content)
        return folder / "Task_dataset.json"

    def test_learn2reg_tests_where_labels_are_and_leaves_those_subjects_out(self, tmp_path):
        split = learn2reg_pairs(self.task(tmp_path), 10, 10)
        assert [pair.cases[0] for pair in split.test] == ["Task_0004", "Task_0005"]
        assert cases_of(split.development) == {"Task_0001", "Task_0002", "Task_0003"}
        first, second = split.test
        assert first.fixed_landmarks and first.fixed_landmarks.name == "Task_0004_0000.csv"
        assert second.fixed_landmarks is None and second.files.moving_labels

    def test_learn2reg_s_own_training_pairs_come_first(self, tmp_path):
        split = learn2reg_pairs(self.task(tmp_path, training_paired_images=(1, 2, 3, 4)), 2, 1)
        assert [pair.cases[0] for pair in split.development] == ["Task_0002", "Task_0003"]
        assert [pair.cases[0] for pair in split.test] == ["Task_0004"]

    def test_learn2reg_s_forms_of_lists(self, tmp_path):
        """Pairs as two names, training scans by kind, and subjects that the only number names."""
        for kind in ("imagesTr", "labelsTr"):
            (tmp_path / kind).mkdir()
            for subject in range(1, 6):
                (tmp_path / kind / f"H_{subject:04}.nii.gz").touch()
        names = [f"./imagesTr/H_{subject:04}.nii.gz" for subject in range(1, 6)]
        training = {"0": [{"image": names[0]}, names[1]], "1": [names[2]]}
        write_json(tmp_path / "H.json", {"training": training, "registration_val": [names[3:5]]})
        split = learn2reg_pairs(tmp_path / "H.json", 10, 10)
        assert [pair.cases for pair in split.test] == [("H_0004", "H_0005")]
        assert [pair.cases for pair in split.development] == [("H_0001", "H_0002"), ("H_0002", "H_0003")]

    def test_two_times_of_a_lone_subject_are_one_case(self, tmp_path):
        names = [f"./imagesTr/H_0001_{time:04}.nii.gz" for time in range(3)]
        for kind in ("imagesTr", "labelsTr"):
            (tmp_path / kind).mkdir()
            for name in names:
                (tmp_path / kind / Path(name).name).touch()
        write_json(tmp_path / "H.json", {"training": names, "registration_val": [names[:2]]})
        with pytest.raises(NnsslError, match="no development pairs"):
            learn2reg_pairs(tmp_path / "H.json", 10, 10)

    @pytest.mark.parametrize(
        ("part", "entry"),
        [
            ("registration_val", {"fixed": 5, "moving": 6}),
            ("training_paired_images", {"0": "a.nii.gz", "1": "b.nii.gz"}),
            ("registration_test", ["a.nii.gz"]),
            ("training", {"label": "a.nii.gz"}),
            ("training", 5),
        ],
    )
    def test_learn2reg_s_other_entries_are_named(self, tmp_path, part, entry):
        path = self.task(tmp_path)
        write_json(path, read_json(path) | {part: [entry]})
        with pytest.raises(NnsslError) as told:
            learn2reg_pairs(path, 10, 10)
        assert f"{part} has the entry {entry}" in told.value.what and "FILE" in told.value.fix

    def test_what_a_dataset_ignores_is_no_structure(self, tmp_path):
        """Nor do voxels count that either label file says to ignore."""
        fixed, moving = (np.zeros((8, 8, 8), np.uint8) for _ in range(2))
        fixed[2:6, 2:6, 2:6] = moving[2:6, 2:6, 2:6] = 1
        fixed[2:6, 2:6, 2] = moving[5, 2:6, 2:6] = 2
        images = [sitk.GetImageFromArray(array) for array in (fixed, moving)]
        counted = _overlap(*images, sitk.Transform(3, sitk.sitkIdentity), None)
        ignored = _overlap(*images, sitk.Transform(3, sitk.sitkIdentity), 2)
        assert counted["dice"]["per_label"].keys() == {"1", "2"} and counted["dice"]["per_label"]["1"] < 1
        assert ignored["dice"]["per_label"] == {"1": 1.0} and ignored["hd95_mm"]["per_label"] == {"1": 0.0}
        folder = self.dataset(tmp_path, 8)
        write_json(folder / "dataset.json", {"file_ending": ".nii.gz", "labels": {"background": 0, "ignore": 2}})
        assert {pair.ignore for pair in dataset_pairs(folder, 3, 4, 0).test} == {2}


class TestSelection:
    strengths = (0.2, 0.6, 1.8, 5.4)

    def curve(self, factor: float = 0.3, score: float = 0.7) -> Curve:
        """SDlogJ falls as a power of the strength, the score is best at 1."""
        scores = [score - 0.02 * np.log(value) ** 2 for value in self.strengths]
        return Curve(
            self.strengths, tuple(factor * value**-0.55 for value in self.strengths), tuple(map(float, scores))
        )

    @pytest.mark.parametrize("wanted", [0.7, 0.3, 0.15, 0.09, 0.8])
    def test_a_power_law_is_inverted_exactly_inside_and_beyond(self, wanted):
        assert self.curve().strength_at(wanted) == pytest.approx((0.3 / wanted) ** (1 / 0.55))

    def test_it_does_not_go_far_beyond_what_was_tried(self):
        assert self.curve().strength_at(1e-4) == pytest.approx(5.4 * BEYOND)
        assert self.curve().strength_at(50.0) == pytest.approx(0.2 / BEYOND)
        assert self.curve().reaches(0.2) and not self.curve().reaches(1.0)

    def test_noise_and_no_deformation_at_all_do_not_break_it(self):
        noisy = Curve(self.strengths, (0.5, 0.2, 0.21, 0.0), (0.1, 0.2, 0.3, 0.4))
        assert 0.2 < noisy.strength_at(0.3) < 0.6
        still = Curve(self.strengths, (0.0,) * 4, (0.5,) * 4)
        assert still.score_at(still.strength_at(0.24)) == 0.5

    def test_the_best_settings_are_those_at_the_wanted_smoothness_not_the_best_anywhere(self):
        """The first reaches a higher score, but with rougher fields than asked for."""
        rough = Curve((1.0, 10.0), (0.9, 0.24), (0.9, 0.6))
        smooth = Curve((1.0, 10.0), (0.24, 0.02), (0.7, 0.5))
        place, strength = best([rough, smooth], 0.24)
        assert (place, strength) == (1, pytest.approx(1.0))


class TestMethods:
    def test_names_and_files(self, tmp_path):
        (tmp_path / "plans.json").write_text("{}")
        named, short, untrained = parse_methods(["MAE=a.pth@encoder0+mind", "mind", f"random:{tmp_path}/plans.json"])
        assert (named.name, named.parts) == ("MAE", ["a.pth@encoder0", "mind"])
        assert short == Method("mind", "mind")
        assert untrained.name == f"random {tmp_path.name} plans.json" and untrained.checkpoints == []
        assert untrained.files == [tmp_path / "plans.json"]

    def test_paths_may_hold_what_joins_and_what_begins_a_level(self, tmp_path):
        path = tmp_path / "me@home" / "a+b" / "c.pth"
        path.parent.mkdir(parents=True)
        path.touch()
        method = Method("net", f"{path}@encoder1+mind")
        assert method.parts == [f"{path}@encoder1", "mind"] and method.checkpoints == method.files == [path]
        _, control = with_controls([Method("net", f"mind+{path}")], 1, lambda _: "same")
        assert control.features == f"mind+random:{path}" and control.files == [path]
        assert parse_methods([str(path)])[0].name == "a+b c.pth"

    @pytest.mark.parametrize(
        ("texts", "words"),
        [
            (["mind", "mind"], "two methods are called 'mind'"),
            (["a/b=mind"], "cannot be a folder's name"),
            (["demons+mind"], "demons are methods of their own"),
        ],
    )
    def test_bad_methods_are_named(self, texts, words):
        with pytest.raises(NnsslError, match=words):
            parse_methods(texts)

    def test_networks_get_the_control_that_is_theirs(self, tmp_path):
        """Two trainings of one network share a control, whoever trained it; another level, another fusion, another network or
        other labels have their own.
        """
        plans = plans_of(primus([16, 16, 16]), [16, 16, 16])
        other = plans_of(primus([16, 16, 16], eva_depth=1), [16, 16, 16])
        for name, content in (("a", content_of(plans)), ("b", content_of(plans, seed=1)), ("c", content_of(other))):
            save_checkpoint(tmp_path / f"{name}.pth", content)
        for name, classes in (("d", 2), ("e", 4)):
            weights = build_network(plans, "3d_fullres", 1, classes).state_dict()
            arguments = {"plans": plans, "configuration": "3d_fullres"}
            content = {"network_weights": weights, "init_args": arguments, "trainer_name": "nnUNetTrainer"}
            torch.save(content, tmp_path / f"{name}.pth")
        a, b, c, d, e = (str(tmp_path / f"{name}.pth") for name in "abcde")
        texts = [f"A={a}", f"B={b}", f"C={c}", f"D={d}", f"E={e}", f"A0={a}@encoder0", f"A+mind={a}+mind"]
        methods = parse_methods(["mind", *texts])
        found = {method.name: method for method in with_controls(methods, 2, untrained_identity)}
        assert found["A"].control == found["B"].control == found["D"].control == "random weights of A"
        assert {found[name].control for name in ("C", "E", "A0", "A+mind")} == {
            f"random weights of {name}" for name in ("C", "E", "A0", "A+mind")
        }
        assert found["mind"].control == "" and len(found) == 13
        assert found["random weights of A+mind"].features == f"random:{a}+mind"
        assert found["random weights of A0"].features == f"random:{a}@encoder0"
        assert found["random weights of A"].seeds == (0, 1)
        assert with_controls(methods, 0, untrained_identity) == methods


def shifted_pair(folder: Path, shift: tuple[int, int, int]):
    """A textured scan and its copy, moved by whole voxels: ``fixed(x) = moving(x + shift)``; anisotropic header."""
    whole = gaussian_filter(np.random.default_rng(0).normal(size=(36, 40, 44)), 2.0)
    whole = (1000 * whole / whole.std()).astype(np.float32)
    box = (slice(6, 30), slice(6, 34), slice(6, 38))
    moved = tuple(slice(part.start + by, part.stop + by) for part, by in zip(box, shift, strict=True))
    grid = {"spacing": (1.0, 1.0, 1.0), "angle": 0.0}
    fixed, moving = write(folder / "f.nii.gz", whole[moved], **grid), write(folder / "m.nii.gz", whole[box], **grid)
    settings = PairSettings(init="none")
    return describe_pair(load_scan(fixed), load_scan(moving), [Intensity()], settings)


@pytest.mark.parametrize("name", ["demons", "convexadam-ours", "convexadam", "syn"])
def test_classical_fields_point_where_ours_do(name, tmp_path):
    """Components z, y, x in voxels; each axis is moved differently. SimpleITK may flip axes of the file, so ask the images."""
    if module := CLASSICAL[name].module:
        pytest.importorskip(module)
    pair = shifted_pair(tmp_path, (1, -2, 3))
    field = CLASSICAL[name].solve(pair, (CLASSICAL[name].strengths or (None,))[0])
    fixed, moving = pair.features
    inner = (slice(None), slice(8, -8), slice(8, -8), slice(8, -8))
    before = (moving - fixed)[inner].square().mean()
    after = (warp(moving, field.displacement_voxels) - fixed)[inner].square().mean()
    assert after < 0.15 * before


def test_no_deformation_is_none(tmp_path):
    pair = shifted_pair(tmp_path, (1, 0, 0))
    assert not CLASSICAL["none"].solve(pair, None).displacement_voxels.any()


def test_a_missing_package_is_named():
    missing = replace(CLASSICAL["syn"], module="no_such_package")
    with pytest.raises(NnsslError, match="no_such_package") as told:
        missing.check()
    assert "nnssl-ext[ants]" in told.value.fix


def test_landmarks_are_compared_in_world_space():
    """Fixed and moving files with different axes, spacings and origins; the truth is a known affine map."""
    truth = sitk.AffineTransform(3)
    truth.Rotate(0, 1, 0.3)
    truth.Translate((4.0, -2.0, 1.0))
    images = []
    for spacing, origin, orientation in (((1, 2, 3), (0, 5, 9), "RAS"), ((2, 1, 1), (-7, 0, 3), "PIL")):
        image = sitk.Image(20, 22, 24, sitk.sitkUInt8)
        image.SetSpacing(spacing)
        image.SetOrigin(origin)
        images.append(sitk.DICOMOrient(image, orientation))
    points = np.random.default_rng(0).uniform(2, 18, (5, 3))
    worlds = [truth.TransformPoint(images[0].TransformContinuousIndexToPhysicalPoint(p.tolist())) for p in points]
    there = np.array([images[1].TransformPhysicalPointToContinuousIndex(world) for world in worlds])
    assert landmark_error(truth, *images, points, there).max() < 1e-6
    off = there + np.array([1.5, 0, 0])  # voxels along the moving file's own first axis
    assert landmark_error(truth, *images, points, off) == pytest.approx(1.5 * images[1].GetSpacing()[0])


def test_costs_are_those_of_the_work_alone():
    keep = np.ones(40 * 2**20, np.uint8)
    with metered(CPU) as first:
        held = np.ones(64 * 2**20, np.uint8)
    with metered(CPU, since=first) as both:
        passing = np.ones(32 * 2**20, np.uint8)
    with metered(CPU) as alone:
        again = np.ones(32 * 2**20, np.uint8)
    if first.memory_gib is None:
        pytest.skip("this system does not tell the peak memory of a process")
    assert [cost.memory_gib * 1024 for cost in (first, both, alone)] == pytest.approx([64, 96, 32], abs=8)
    assert keep.size and held.size and passing.size and again.size
    assert first.cpu_seconds > 0 and first.seconds > 0
