"""Foreground patches: boxes, shares, policies, padding, splits, and voxels in their right place."""

from __future__ import annotations

import json

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from scans import label, voxels, write

from nnssl_ext.dataset_conversion.patches import PatchSettings, draw_patches, plan_patches
from nnssl_ext.dataset_conversion.raw_dataset import convert
from nnssl_ext.errors import NnsslError


def ball(shape=(30, 30, 30), radius=9):
    grid = np.indices(shape) - np.array(shape).reshape(3, 1, 1, 1) // 2
    return (grid**2).sum(0) <= radius**2


def share_by_counting(mask, crop):
    """The definition, voxel by voxel; outside the volume is background."""
    inside = 0
    for z in range(crop.lower[0], crop.upper[0]):
        for y in range(crop.lower[1], crop.upper[1]):
            for x in range(crop.lower[2], crop.upper[2]):
                within = all(0 <= v < n for v, n in zip((z, y, x), mask.shape, strict=True))
                inside += bool(within and mask[z, y, x])
    return inside / np.prod(np.subtract(crop.upper, crop.lower))


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(*[st.integers(2, 14)] * 3),
    size=st.tuples(*[st.integers(2, 12)] * 3),
    seed=st.integers(0, 99),
)
def test_shares_are_counted_and_boxes_stay_inside_where_they_fit(shape, size, seed):
    rng = np.random.default_rng(seed)
    mask = rng.random(shape) < 0.5
    mask[0, 0, 0] = True
    patches = draw_patches(mask, size, PatchSettings(5, (1, 1, 1), attempts=5), rng)
    assert patches and len({patch.crop.lower for patch in patches}) == len(patches)
    for patch in patches:
        assert tuple(np.subtract(patch.crop.upper, patch.crop.lower)) == size
        assert patch.share == pytest.approx(share_by_counting(mask, patch.crop))
        assert 1 <= patch.attempts <= 5
        for low, high, length, n in zip(patch.crop.lower, patch.crop.upper, shape, size, strict=True):
            if n <= length:
                assert low >= 0 and high <= length
            else:  # centred: sticks out on both sides alike
                assert low < 1 and high > length - 1 and abs((0 - low) - (high - length)) <= 1


def test_policies_differ_where_the_share_is_out_of_reach():
    mask = ball()  # a ball of radius 9 fills at most 4/3 pi 9^3 / 20^3 = 38 % of a 20-voxel cube
    size = (20, 20, 20)

    def drawn(policy, least):
        chosen = PatchSettings(3, (20, 20, 20), min_foreground=least, policy=policy, attempts=20)
        return draw_patches(mask, size, chosen, np.random.default_rng(0))

    assert drawn("skip", 0.5) == [] and drawn("strict", 0.5) == []
    best = drawn("best-effort", 0.5)
    assert len(best) == 3 and all(0.15 < patch.share < 0.39 for patch in best)
    assert all(patch.share >= 0.3 and patch.attempts <= 20 for patch in drawn("skip", 0.3))
    assert len(drawn("strict", 0.3)) == 3


def test_equal_seeds_give_equal_crops_and_one_place_gives_one_crop():
    chosen = PatchSettings(4, (8, 8, 8))
    one, two = (draw_patches(ball(), (8, 8, 8), chosen, np.random.default_rng(3)) for _ in range(2))
    assert one == two
    assert len(draw_patches(np.ones((8, 8, 8), bool), (8, 8, 8), chosen, np.random.default_rng(3))) == 1


@pytest.fixture
def dataset(tmp_path):
    """Three subjects with two scans each; label-free foreground is everywhere in these noise images."""
    folder = tmp_path / "Dataset001_Whole"
    for seed in range(6):
        name = f"s{seed // 2}_{seed % 2}"
        write(folder / "imagesTr" / f"{name}_0000.nii.gz", voxels(seed))
        write(folder / "imagesTr" / f"{name}_0001.nii.gz", voxels(seed + 50))
        write(folder / "labelsTr" / f"{name}.nii.gz", label(seed))
    (folder / "dataset.json").write_text(
        json.dumps(
            {
                "channel_names": {"0": "T1", "1": "T2"},
                "labels": {"background": 0, "one": 1, "two": 2},
                "numTraining": 6,
                "file_ending": ".nii.gz",
            }
        )
    )
    return folder


def test_crops_lie_where_the_manifest_says(dataset, tmp_path):
    """Brute force: every voxel of a crop is the source's voxel at the same place in mm."""
    chosen = PatchSettings(2, (6, 6, 6), subject_pattern="^s[0-9]")
    target = tmp_path / "Dataset002_Patches"
    convert(plan_patches(dataset, chosen), target)
    manifest = json.loads((target / "patches.json").read_text())
    assert manifest["source"] == "Dataset001_Whole" and manifest["settings"]["min_foreground"] == 0.7
    assert len(manifest["patches"]) == 12
    for name, entry in manifest["patches"].items():
        assert entry["foreground_share"] == 1.0 and entry["subject"] == entry["source"][:2]
        (z, y, x), (z2, y2, x2) = entry["lower"], entry["upper"]
        for folder, ends in (("imagesTr", ("_0000", "_0001")), ("labelsTr", ("",))):
            for end in ends:
                source = sitk.ReadImage(str(dataset / folder / f"{entry['source']}{end}.nii.gz"))
                crop = sitk.ReadImage(str(target / folder / f"{name}{end}.nii.gz"))
                expected = sitk.GetArrayFromImage(source)[z:z2, y:y2, x:x2]
                np.testing.assert_array_equal(sitk.GetArrayFromImage(crop), expected)
                corner = source.TransformIndexToPhysicalPoint((x, y, z))
                np.testing.assert_allclose(crop.GetOrigin(), corner, atol=1e-4)
                np.testing.assert_allclose(crop.GetDirection(), source.GetDirection(), atol=1e-6)


def test_small_volumes_are_padded_around_their_place(dataset, tmp_path):
    chosen = PatchSettings(1, (14, 8, 8), min_foreground=0.5)
    target = tmp_path / "Dataset002_Patches"
    convert(plan_patches(dataset, chosen, limit=1), target)
    entry = json.loads((target / "patches.json").read_text())["patches"]["s0_0_p000"]
    assert (entry["lower"][0], entry["upper"][0]) == (-2, 12)
    assert entry["foreground_share"] == pytest.approx(10 / 14, abs=1e-4)
    source = sitk.ReadImage(str(dataset / "imagesTr" / "s0_0_0000.nii.gz"))
    crop = sitk.ReadImage(str(target / "imagesTr" / "s0_0_p000_0000.nii.gz"))
    array, whole = sitk.GetArrayFromImage(crop), sitk.GetArrayFromImage(source)
    y, x = entry["lower"][1:]
    np.testing.assert_array_equal(array[2:12], whole[:, y : y + 8, x : x + 8])
    assert (array[:2] == whole.min()).all() and (array[12:] == whole.min()).all()
    np.testing.assert_allclose(crop.GetOrigin(), source.TransformIndexToPhysicalPoint((x, y, -2)), atol=1e-4)
    mask = sitk.GetArrayFromImage(sitk.ReadImage(str(target / "labelsTr" / "s0_0_p000.nii.gz")))
    assert not mask[:2].any() and not mask[12:].any()


def test_labels_are_padded_with_background_whatever_their_lowest_value(dataset, tmp_path):
    write(dataset / "labelsTr" / "s0_0.nii.gz", np.ones((10, 12, 14), np.uint8))
    convert(plan_patches(dataset, PatchSettings(1, (14, 8, 8)), limit=1), tmp_path / "Dataset002_Patches")
    mask = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "Dataset002_Patches/labelsTr/s0_0_p000.nii.gz")))
    assert mask[2:12].all() and not mask[:2].any() and not mask[12:].any()


def test_hidden_files_are_no_cases(dataset):
    (dataset / "imagesTr" / "._s0_0_0000.nii.gz").write_bytes(b"what macOS leaves behind")
    planned = plan_patches(dataset, PatchSettings(1, (4, 4, 4)))
    assert not planned.problems and len(planned.cases) == 6


def test_sizes_in_mm_follow_the_spacing(dataset):
    planned = plan_patches(dataset, PatchSettings(1, (12.5, 4.8, 4.2), unit="mm"), limit=1)
    crop = planned.cases[0].channels[0].crop
    assert tuple(np.subtract(crop.upper, crop.lower)) == (5, 6, 6)  # 2.5, 0.8, 0.7 mm


def test_no_subject_is_on_both_sides_of_a_fold_and_the_cap_holds(dataset):
    chosen = PatchSettings(4, (4, 4, 4), per_subject=5, subject_pattern="^(s[0-9])_")
    planned = plan_patches(dataset, chosen)
    names = [case.identifier for case in planned.cases]
    assert [sum(name.startswith(f"s{k}") for name in names) for k in range(3)] == [5, 5, 5]
    folds = planned.companions(names)["splits_final.json"]
    assert len(folds) == 3
    assert sorted(name for fold in folds for name in fold["val"]) == sorted(names)
    for fold in folds:
        assert sorted(fold["train"] + fold["val"]) == sorted(names)
        assert not {name[:2] for name in fold["train"]} & {name[:2] for name in fold["val"]}


def test_foreground_masks_in_the_dataset_are_used(dataset):
    description = json.loads((dataset / "dataset.json").read_text())
    description["labels"] = {"background": 0, "foreground": 1}
    (dataset / "dataset.json").write_text(json.dumps(description))
    for seed in range(6):
        mask = np.zeros((10, 12, 14), np.uint8)
        mask[2:8, 3:9, 4:10] = 1
        write(dataset / "labelsTr" / f"s{seed // 2}_{seed % 2}.nii.gz", mask)
    planned = plan_patches(dataset, PatchSettings(1, (6, 6, 6), min_foreground=1.0, policy="strict", attempts=5000))
    assert not planned.problems
    assert {case.channels[0].crop.lower for case in planned.cases} == {(2, 3, 4)}


def test_regions_stay_regions(dataset, tmp_path):
    description = json.loads((dataset / "dataset.json").read_text())
    description |= {"labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [1, 2]}
    (dataset / "dataset.json").write_text(json.dumps(description))
    convert(plan_patches(dataset, PatchSettings(1, (6, 6, 6)), limit=2), tmp_path / "Dataset002_Patches")
    written = json.loads((tmp_path / "Dataset002_Patches" / "dataset.json").read_text())
    assert written["labels"] == description["labels"] and written["regions_class_order"] == [1, 2]


def test_strict_names_the_case_and_what_to_lower(dataset, tmp_path):
    planned = plan_patches(dataset, PatchSettings(2, (20, 20, 20), policy="strict", attempts=3), limit=1)
    with pytest.raises(NnsslError) as caught:
        convert(planned, tmp_path / "Dataset002_Patches")
    told = str(caught.value)
    assert f"case s0_0: {dataset / 'imagesTr' / 's0_0_0000.nii.gz'}: 0 of 2 crops of 20x20x20 voxels hold 70%" in told
    assert "lower --min-foreground, --size or --count" in told


def test_bad_settings_are_named():
    with pytest.raises(NnsslError, match=r"--min-foreground 1.5 is no share"):
        PatchSettings(1, (4, 4, 4), min_foreground=1.5)
    with pytest.raises(NnsslError, match="is not positive"):
        PatchSettings(1, (4, 0, 4))


def test_image_only_source_is_told_what_to_run(dataset):
    (dataset / "labelsTr" / "s0_0.nii.gz").unlink()
    with pytest.raises(NnsslError, match="nnssl_convert foreground -d 1"):
        plan_patches(dataset, PatchSettings(1, (4, 4, 4)))
