"""Every bad input: the message names the file, the reason and the remedy; nothing is written, or the rest is."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from scans import dicom_series, files_below, image, label, labelled_folder, repack, truncate, voxels, write

from nnssl_ext.dataset_conversion.bids import plan_bids
from nnssl_ext.dataset_conversion.dataset_ids import new_dataset
from nnssl_ext.dataset_conversion.folder import plan_folder
from nnssl_ext.dataset_conversion.raw_dataset import convert
from nnssl_ext.errors import NnsslError


def message_of(tmp_path: Path, **options) -> str:
    """What converting `images` (and `labels`) says; and that nothing was written."""
    target = tmp_path / "raw" / "Dataset001_Bad"
    options = {"channels": ["MRI"], **options}
    with pytest.raises(NnsslError) as caught:
        convert(plan_folder(tmp_path / "images", **options), target)
    assert not list(target.parent.glob("*")) and not list(target.parent.glob(".*"))
    return str(caught.value)


@dataclass(frozen=True)
class Bad:
    """How to spoil image or label b of three good cases, and what the message then holds."""

    spoil: str
    reason: str
    remedy: str
    in_label: bool = False


def _truncated_gz(path):
    truncate(path)


def _truncated_nii_behind_good_gzip(path):
    repack(path, lambda content: content.__delitem__(slice(-400, None)))


def _garbage(path):
    path.write_bytes(b"these are no scans")


def _flat(path):
    sitk.WriteImage(sitk.GetImageFromArray(voxels()[0]), str(path))


def _single_slice(path):
    write(path, voxels()[:1])


def _four(path):
    nibabel.save(nibabel.Nifti1Image(np.stack([voxels()] * 3, -1), np.eye(4)), path)


def _vector(path):
    sitk.WriteImage(sitk.GetImageFromArray(np.stack([voxels()] * 3, -1), isVector=True), str(path))


def _nan(path):
    array = voxels()
    array[1, 2, 3:5] = np.nan
    array[0, 0, 0] = np.inf
    write(path, array)


def _complex(path):
    nibabel.save(nibabel.Nifti1Image(voxels().astype(np.complex64), np.eye(4)), path)


def _no_voxel_size(path):
    repack(path, lambda content: content.__setitem__(slice(84, 88), bytes(4)))  # pixdim[2]


def _infinite_voxel_size(path):
    repack(path, lambda content: content.__setitem__(slice(84, 88), np.float32(np.inf).tobytes()))


def _not_fetched(path):
    path.unlink()
    path.symlink_to(".git/annex/objects/gone")


def _constant(path):
    write(path, np.full_like(voxels(), 7))


def _sheared(path):
    affine = np.eye(4)
    affine[0, 1] = 0.3
    nibabel.save(nibabel.Nifti1Image(voxels(), affine), path)


def _other_shape(path):
    write(path, label()[:, :, :-2])


def _other_spacing(path):
    write(path, label(), spacing=(0.7, 0.8, 2.6))


def _other_origin(path):
    write(path, label(), origin=(-11.5, 21.25, -300.0))


def _other_direction(path):
    write(path, label(), angle=0.0)


def _fractions(path):
    write(path, label().astype(np.float32) * 0.5)


def _unknown_value(path):
    write(path, label() * 4)


CASES = {
    "truncated gzip": Bad("_truncated_gz", "truncated or damaged", "copy, download or export the file again"),
    "truncated inside": Bad(
        "_truncated_nii_behind_good_gzip",
        "truncated: 6320 of 6720 bytes of voxels are there",
        "copy, download or export the file again",
    ),
    "garbage": Bad(
        "_garbage", "unreadable: no NIfTI file, or cut off in its header", "copy, download or export the file again"
    ),
    "2D": Bad("_flat", "2D (14x12 voxels) where 3D is needed", "stack the slices"),
    "one slice": Bad("_single_slice", "2D (14x12x1 voxels) where 3D is needed", "stack the slices"),
    "4D": Bad("_four", "4D (10x12x14x3 voxels) where 3D is needed", "split it into one 3D file per volume"),
    "vectors": Bad("_vector", "3 values per voxel where 1 is needed", "split it into one 3D file per volume"),
    "NaN and Inf": Bad("_nan", "3 of 1680 voxels are NaN or infinite", "replace them by a meaningful value"),
    "complex": Bad("_complex", "complex values where real ones are needed", "convert it to magnitude"),
    "voxel size 0": Bad("_no_voxel_size", "voxel size 0.7x0x2.5 mm (x, y, z) in the header", "correct pixdim"),
    "voxel size inf": Bad("_infinite_voxel_size", "voxel size 0.7xinfx2.5 mm", "correct pixdim"),
    "not fetched": Bad("_not_fetched", "no such file behind this link", "fetch it (git annex get, datalad get)"),
    "label not fetched": Bad("_not_fetched", "no such file behind this link", "fetch it", True),
    "constant": Bad("_constant", "constant image, all voxels equal 7.0", "export it again"),
    "sheared": Bad("_sheared", "direction is not orthonormal", "resample it onto an orthogonal grid"),
    "label shape": Bad(
        "_other_shape", "shape 10x12x12 differs from 10x12x14", "resample it onto the image's grid", True
    ),
    "label spacing": Bad("_other_spacing", "affine differs", "correct its header", True),
    "label origin": Bad("_other_origin", "affine differs", "correct its header", True),
    "label direction": Bad("_other_direction", "affine differs", "correct its header", True),
    "label fractions": Bad("_fractions", "labels are not integers (e.g. 0.5)", "nearest neighbours", True),
    "label unknown": Bad(
        "_unknown_value", "unknown label values [4, 8]; known: 0 background, 1 one, 2 two", "name the values", True
    ),
    "label truncated": Bad(
        "_truncated_gz", "unreadable: no NIfTI file, or cut off in its header", "copy, download", True
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_file_is_named_and_stops_all(tmp_path, name):
    bad = CASES[name]
    images, labels = labelled_folder(tmp_path)
    path = (labels if bad.in_label else images) / "b.nii.gz"
    globals()[bad.spoil](path)
    told = message_of(tmp_path, labels=labels, label_names=["air", "one", "two"])
    assert "1 case(s) cannot be converted, so nothing was written" in told
    for part in (f"case b: {path}: {bad.reason}", bad.remedy, "--skip-bad"):
        assert part in told, told


@pytest.mark.parametrize("name", CASES)
def test_skip_bad_converts_the_rest(tmp_path, name):
    bad = CASES[name]
    images, labels = labelled_folder(tmp_path)
    globals()[bad.spoil]((labels if bad.in_label else images) / "b.nii.gz")
    planned = plan_folder(images, channels=["MRI"], labels=labels, label_names=["air", "one", "two"])
    target = tmp_path / "Dataset001_Rest"
    done = convert(planned, target, skip_bad=True)
    assert len(done.problems) == 1
    assert files_below(target) == {
        "dataset.json",
        *(f"{folder}/{case}{end}.nii.gz" for folder, end in (("imagesTr", "_0000"), ("labelsTr", "")) for case in "ac"),
    }
    assert json.loads((target / "dataset.json").read_text())["numTraining"] == 2


@pytest.mark.parametrize("ending", [".nrrd", ".mha", ".nii"])
def test_truncated_files_of_other_formats(tmp_path, ending):
    path = write(tmp_path / "images" / f"b{ending}", voxels())
    truncate(path)
    told = message_of(tmp_path)
    assert f"case b: {path}: " in told
    assert "truncated" in told or "unreadable" in told
    assert "copy, download or export the file again" in told


def test_sheared_nrrd_that_itk_reads_without_complaint(tmp_path):
    path = tmp_path / "images" / "b.nrrd"
    path.parent.mkdir()
    sitk.WriteImage(image(voxels(), angle=0.0), str(path), False)
    content = path.read_bytes()
    assert b"(0,0.8" in content.replace(b"00000000000000004", b"")
    start = content.index(b"space directions:")
    end = content.index(b"\n", start)
    path.write_bytes(content[:start] + b"space directions: (0.7,0,0) (0.3,0.8,0) (0,0,2.5)" + content[end:])
    assert f"{path}: direction is not orthonormal" in message_of(tmp_path)


def test_all_bad_cases_are_told_together(tmp_path):
    images, labels = labelled_folder(tmp_path)
    _nan(images / "a.nii.gz")
    _fractions(labels / "c.nii.gz")
    told = message_of(tmp_path, labels=labels)
    assert "2 case(s) cannot be converted" in told
    assert f"1. case a: {images / 'a.nii.gz'}" in told
    assert f"2. case c: {labels / 'c.nii.gz'}" in told


def test_image_given_as_label(tmp_path):
    _, labels = labelled_folder(tmp_path, ("a",))
    write(labels / "a.nii.gz", (voxels() * 20).astype(np.int16))
    assert "unknown label values" in message_of(tmp_path, labels=labels)


def test_missing_label_and_missing_channel(tmp_path):
    _, labels = labelled_folder(tmp_path)
    (labels / "b.nii.gz").unlink()
    assert f"case b: no label {labels / 'b'}.*" in message_of(tmp_path, labels=labels)
    for name in ("a_t1", "a_t2", "b_t1"):
        write(tmp_path / "more" / "images" / f"{name}.nii.gz", voxels())
    told = message_of(tmp_path / "more", channels=["T1", "T2"], channel_suffixes=["_t1", "_t2"])
    assert f"case b: no channel _t2 in {tmp_path / 'more' / 'images'}" in told


def test_channels_on_different_grids(tmp_path):
    write(tmp_path / "images" / "a_0000.nii.gz", voxels())
    second = write(tmp_path / "images" / "a_0001.nii.gz", voxels(), spacing=(0.7, 0.9, 2.5))
    told = message_of(tmp_path, channels=["T1", "T2"], channel_suffixes=["_0000", "_0001"])
    assert f"case a: {second}: affine differs" in told


def test_duplicate_case_names_and_the_remedy(tmp_path):
    first = write(tmp_path / "images" / "p1" / "scan.nii.gz", voxels(1))
    second = write(tmp_path / "images" / "p2" / "scan.nrrd", voxels(2))
    told = message_of(tmp_path)
    assert f"case scan: duplicate case name: {first}, {second}" in told
    assert "--names path" in told
    planned = plan_folder(tmp_path / "images", channels=["MRI"], names="path")
    assert [case.identifier for case in planned.cases] == ["p1_scan", "p2_scan"]


def test_duplicates_that_are_label_maps(tmp_path):
    for folder in ("imagesTr", "labelsTr"):
        write(tmp_path / "images" / folder / "a.nii.gz", voxels())
    told = message_of(tmp_path)
    assert f"set --labels {tmp_path / 'images' / 'labelsTr'}" in told and "--names path" not in told


def test_duplicates_of_a_source_without_names(tmp_path):
    for session in ("ses-1", "ses-2"):
        write(tmp_path / "bids" / "sub-1" / session / "anat" / "sub-1_T1w.nii.gz", voxels())
    with pytest.raises(NnsslError, match="case sub-1_T1w: duplicate case name: ") as caught:
        convert(plan_bids(tmp_path / "bids"), tmp_path / "Dataset001_Bad")
    assert "rename all but one" in str(caught.value) and "--names" not in str(caught.value)


def test_names_that_become_one_after_cleaning(tmp_path):
    write(tmp_path / "images" / "scan 1.nii.gz", voxels(1))
    write(tmp_path / "images" / "scan-1.nii.gz", voxels(2))
    assert "case scan-1: duplicate case name (the names coincide after cleaning" in message_of(tmp_path)


def test_accents_go_and_names_without_latin_letters_are_refused(tmp_path):
    write(tmp_path / "images" / "Müller é.nii.gz", voxels())
    (case,) = plan_folder(tmp_path / "images", channels=["MRI"]).cases
    assert case.identifier == "Muller-e"
    for name in ("###", "снимок_один"):
        path = write(tmp_path / name / "images" / f"{name}.nii.gz", voxels())
        told = message_of(tmp_path / name)
        assert f"{path}: no Latin letter or digit" in told and "rename this file" in told


def test_limit_does_not_fail_on_bad_cases_beyond_it(tmp_path):
    images, labels = labelled_folder(tmp_path)
    (labels / "b.nii.gz").unlink()
    planned = plan_folder(images, channels=["MRI"], labels=labels)
    first = planned.first(2)
    assert [case.identifier for case in first.cases] == ["a", "c"] and not first.problems
    assert first.notes[-1].startswith("--limit leaves out 1 bad case(s), e.g. case b: no label")
    assert len(planned.first(3).problems) == 1  # the third is a bad one


def test_dicom_missing_slice(tmp_path):
    dicom_series(tmp_path / "images" / "p1", skip=(3,))
    told = message_of(tmp_path, channels=[])
    assert f"case p1: {tmp_path / 'images' / 'p1'}: missing slices: 5 mm between slice004.dcm and slice002.dcm" in told
    assert "elsewhere 2.5 mm" in told and "fetch the missing slices" in told


def test_dicom_mixed_series_in_one_folder(tmp_path):
    dicom_series(tmp_path / "images" / "p1")
    dicom_series(tmp_path / "images" / "p1", series="1.2.3.4.2", start=50)
    told = message_of(tmp_path)
    assert f"{tmp_path / 'images' / 'p1'}: mixed series: 2 DICOM series in one folder" in told
    assert "put each series into its own folder" in told


def test_dicom_two_phases_under_one_series_number(tmp_path):
    dicom_series(tmp_path / "images" / "p1")
    dicom_series(tmp_path / "images" / "p1", start=50)
    told = message_of(tmp_path)
    assert "mixed series: slice0" in told and "lie at the same position" in told


def test_dicom_tilted_gantry(tmp_path):
    dicom_series(tmp_path / "images" / "p1", tilt=0.4)
    assert "direction is not orthonormal: slices are shifted" in message_of(tmp_path)


def test_dicom_damaged_slice(tmp_path):
    dicom_series(tmp_path / "images" / "p1")
    path = tmp_path / "images" / "p1" / "slice003.dcm"
    path.write_bytes(b"\0" * 128 + b"DICM" + b"nonsense")
    assert "unreadable: 1 of 6 DICOM files, e.g. slice003.dcm" in message_of(tmp_path)


@pytest.mark.parametrize("suffix", [".dcm", ""])
def test_dicom_slice_that_is_not_fetched(tmp_path, suffix):
    dicom_series(tmp_path / "images" / "p1", suffix=suffix)
    _not_fetched(tmp_path / "images" / "p1" / f"slice006{suffix}")
    told = message_of(tmp_path, channels=[])
    assert "1 link(s) to missing files beside " in told and f"e.g. slice006{suffix}\n" in told


def test_file_without_ending_that_cannot_be_opened(tmp_path):
    images, _ = labelled_folder(tmp_path)
    (images / "notes").symlink_to("notes")  # a circle: root may open anything else
    assert f"{images / 'notes'}: unreadable: Too many levels of symbolic links" in message_of(tmp_path)
    planned = plan_folder(images, channels=["MRI"])
    assert len(convert(planned, tmp_path / "Dataset001_Rest", skip_bad=True).cases) == 3


def test_folder_that_cannot_be_read(tmp_path, monkeypatch):
    images, _ = labelled_folder(tmp_path)
    closed = write(images / "closed" / "d.nii.gz", voxels()).parent
    scandir = os.scandir

    def denied(path):  # as for others than root
        if str(path) == str(closed):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    assert f"{closed}: folder cannot be read: Permission denied" in message_of(tmp_path)
    planned = plan_folder(images, channels=["MRI"])
    assert len(convert(planned, tmp_path / "Dataset001_Rest", skip_bad=True).cases) == 3


@pytest.mark.parametrize("name", ["b.Nii.gz", "b.nii.GZ", "b.Nii", "b.MHA"])
def test_ending_in_letters_that_itk_does_not_read(tmp_path, name):
    good = write(tmp_path / "images" / name.lower(), voxels())
    good.rename(good.with_name(name))
    ending = name.removeprefix("b")
    told = message_of(tmp_path)
    assert f"{good.with_name(name)}: ending {ending} is not read" in told and f"end in {ending.lower()}" in told


def test_without_a_good_case_its_problems_are_told_first(tmp_path):
    dicom_series(tmp_path / "images" / "p1")
    dicom_series(tmp_path / "images" / "p1", series="1.2.3.4.2", start=50)
    told = message_of(tmp_path, channels=[])
    assert "mixed series: 2 DICOM series in one folder" in told and "do not tell their modality" not in told


def test_single_dicom_slice_is_2d(tmp_path):
    dicom_series(tmp_path / "images" / "p1", slices=1)
    assert "2D (14x12x1 voxels) where 3D is needed" in message_of(tmp_path)


def test_mixed_or_untold_modality(tmp_path):
    dicom_series(tmp_path / "images" / "p1")
    dicom_series(tmp_path / "images" / "p2", modality="MR")
    assert "mixes modalities: CT and MRI" in message_of(tmp_path, channels=[])
    write(tmp_path / "b" / "images" / "a.nii.gz", voxels())
    assert "--channels CT (Hounsfield units), --channels MRI" in message_of(tmp_path / "b", channels=[])


def test_no_foreground_without_labels(tmp_path):
    """A constant image has no foreground; it is told as constant, which is the better reason."""
    path = write(tmp_path / "images" / "a.nii.gz", np.full_like(voxels(), 3))
    assert f"case a: {path}: constant image" in message_of(tmp_path)


def test_dataset_id_that_is_taken_anywhere(nnunet_env):
    (nnunet_env.raw / "Dataset007_Old").mkdir()
    (nnunet_env.preprocessed / "Dataset008_Other").mkdir()
    with pytest.raises(NnsslError) as caught:
        new_dataset(7, "New")
    assert str(caught.value) == (
        f"dataset id 7 is taken: {nnunet_env.raw / 'Dataset007_Old'}\n"
        "  -> choose another, e.g. -d 9, or remove that folder"
    )
    with pytest.raises(NnsslError, match="dataset id 8 is taken"):
        new_dataset(8, "New")
    (nnunet_env.preprocessed / "Dataset010_New").mkdir()
    assert new_dataset(10, "New") == nnunet_env.raw / "Dataset010_New"  # the same dataset, converted again
    for number, name in ((0, "New"), (1000, "New"), (11, "New name"), (11, "../x")):
        with pytest.raises(NnsslError):
            new_dataset(number, name)


def test_missing_environment_variable(monkeypatch):
    monkeypatch.delenv("nnUNet_raw", raising=False)
    with pytest.raises(NnsslError, match="environment variable nnUNet_raw is not set") as caught:
        new_dataset(7, "New")
    assert "export nnUNet_raw=" in str(caught.value)


def test_not_a_folder_and_an_empty_one(tmp_path):
    with pytest.raises(NnsslError, match="is not a folder"):
        plan_folder(tmp_path / "nowhere", channels=["MRI"])
    with pytest.raises(NnsslError, match="no NIfTI, NRRD, MHA or DICOM images"):
        plan_folder(tmp_path, channels=["MRI"])
