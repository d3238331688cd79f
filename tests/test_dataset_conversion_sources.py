"""Each source: voxels and geometry arrive exactly, named and channelled as they should."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from scans import decathlon, dicom_series, files_below, image, label, labelled_folder, voxels, write

from nnssl_ext.dataset_conversion.bids import plan_bids
from nnssl_ext.dataset_conversion.cases import PlannedDataset
from nnssl_ext.dataset_conversion.folder import plan_folder
from nnssl_ext.dataset_conversion.foreground import add_foreground
from nnssl_ext.dataset_conversion.msd import plan_msd
from nnssl_ext.dataset_conversion.nnssl_collection import export_collection, plan_collection
from nnssl_ext.dataset_conversion.raw_dataset import convert
from nnssl_ext.errors import NnsslError


def converted(planned: PlannedDataset, tmp_path: Path) -> tuple[Path, dict]:
    target = tmp_path / "raw" / "Dataset001_Demo"
    convert(planned, target)
    return target, json.loads((target / "dataset.json").read_text())


def assert_same_image(path: Path, array: np.ndarray, **grid) -> None:
    """Voxels, spacing, origin and direction as written by `scans.write`, to NIfTI's float32 header precision."""
    found, expected = sitk.ReadImage(str(path)), image(array, **grid)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(found), array)
    np.testing.assert_allclose(found.GetSpacing(), expected.GetSpacing(), rtol=1e-6)
    np.testing.assert_allclose(found.GetOrigin(), expected.GetOrigin(), rtol=1e-6)
    np.testing.assert_allclose(found.GetDirection(), expected.GetDirection(), atol=1e-6)


def test_decathlon_files_are_copied_byte_for_byte(tmp_path):
    task = decathlon(tmp_path / "Task77_Demo")
    name, planned = plan_msd(task)
    target, description = converted(planned, tmp_path)
    assert name == "Demo"
    for case in ("case_1", "case_2"):
        for there, here in ((f"imagesTr/{case}", f"imagesTr/{case}_0000"), (f"labelsTr/{case}", f"labelsTr/{case}")):
            assert (task / f"{there}.nii.gz").read_bytes() == (target / f"{here}.nii.gz").read_bytes()
    assert description["channel_names"] == {"0": "MRI"}
    assert description["labels"] == {"background": 0, "one": 1, "two": 2}
    assert (description["numTraining"], description["file_ending"], description["licence"]) == (2, ".nii.gz", "CC0")


def test_decathlon_fourth_axis_becomes_channels(tmp_path):
    _, planned = plan_msd(decathlon(tmp_path / "Task77_Demo", ("FLAIR", "T1w", "CT")))
    target, description = converted(planned, tmp_path)
    assert description["channel_names"] == {"0": "FLAIR", "1": "T1w", "2": "CT"}
    for case, seed in (("case_1", 0), ("case_2", 10)):
        for channel in range(3):
            assert_same_image(target / "imagesTr" / f"{case}_{channel:04d}.nii.gz", voxels(seed + channel))


def test_decathlon_with_more_channels_named_than_there_are(tmp_path):
    task = decathlon(tmp_path / "Task77_Demo", ("FLAIR", "T1w"))
    with pytest.raises(NnsslError, match=r"2 volume\(s\) .*, but 3 channel name\(s\): a, b, c"):
        converted(plan_msd(task, ("a", "b", "c"))[1], tmp_path)


@pytest.mark.parametrize("names", [("T1w",), ("FLAIR", "T1w")])
def test_decathlon_with_fewer_channels_named_than_there_are(tmp_path, names):
    task = decathlon(tmp_path / "Task77_Demo", ("FLAIR", "T1w", "CT"), names=("a",))
    with pytest.raises(NnsslError) as caught:
        converted(plan_msd(task, names)[1], tmp_path)
    told = (
        f"3 volume(s) along the fourth axis (14x12x10x3 voxels), but {len(names)} channel name(s): {', '.join(names)}"
    )
    assert f"case a: {task / 'imagesTr' / 'a.nii.gz'}: {told}" in str(caught.value)
    assert "name every volume, in order, with --channels" in str(caught.value)


def test_cut_down_decathlon_is_noted_and_half_a_case_is_a_problem(tmp_path):
    task = decathlon(tmp_path / "Task77_Demo", names=("a", "b", "c"))
    for folder in ("imagesTr", "labelsTr"):
        (task / folder / "c.nii.gz").unlink()
    (task / "imagesTr" / "._a.nii.gz").write_bytes(b"what macOS leaves behind")
    planned = plan_msd(task)[1]
    assert planned.notes == ("1 of 3 cases in dataset.json are not in the folder",)
    assert [case.identifier for case in planned.cases] == ["a", "b"] and not planned.problems
    for folder in ("imagesTr", "labelsTr"):
        (task / folder / "c.nii.gz").symlink_to("not_fetched")
    assert [p.what for p in plan_msd(task)[1].problems] == [f"case c: {task / 'imagesTr' / 'c.nii.gz'}: no such file"]
    (task / "labelsTr" / "b.nii.gz").unlink()
    with pytest.raises(NnsslError, match=r"case b: .*labelsTr/b.nii.gz: no such file"):
        converted(plan_msd(task)[1], tmp_path)
    content = json.loads((task / "dataset.json").read_text())
    content["labels"]["0"] = "Background"  # nnU-Net insists on the word
    (task / "dataset.json").write_text(json.dumps(content))
    assert plan_msd(task)[1].labels == {"background": 0, "one": 1, "two": 2}
    (task / "dataset.json").write_text('{"labels": {}}')
    with pytest.raises(NnsslError, match="has no modality, training"):
        plan_msd(task)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("modality", ["MRI"]),
        ("modality", {"0": 1}),
        ("labels", ["background", "one"]),
        ("labels", {"background": 0}),
        ("training", ["./imagesTr/case_1.nii.gz"]),
        ("training", 2),
    ],
)
def test_decathlon_entries_of_another_form_are_named(tmp_path, key, value):
    listing = decathlon(tmp_path / "Task77_Demo") / "dataset.json"
    listing.write_text(json.dumps(json.loads(listing.read_text()) | {key: value}))
    with pytest.raises(NnsslError, match="does not look like") as refused:
        plan_msd(listing.parent)
    assert refused.value.what.startswith(f"{listing}: '{key}' ")


@pytest.mark.parametrize("ending", [".nii", ".nrrd", ".mha", ".nii.gz"])
def test_folder_formats_keep_geometry(tmp_path, ending):
    source = write(tmp_path / "in" / f"scan{ending}", voxels())
    target, description = converted(plan_folder(tmp_path / "in", channels=["MRI"]), tmp_path)
    assert_same_image(target / "imagesTr" / "scan_0000.nii.gz", voxels())
    mask = sitk.ReadImage(str(target / "labelsTr" / "scan.nii.gz"))
    assert set(np.unique(sitk.GetArrayFromImage(mask))) <= {0, 1}
    np.testing.assert_allclose(mask.GetOrigin(), sitk.ReadImage(str(source)).GetOrigin(), rtol=1e-6)
    assert description["labels"] == {"background": 0, "foreground": 1}


def test_nibabel_sees_the_same_place_before_and_after(tmp_path):
    source = write(tmp_path / "in" / "scan.nii", voxels())
    target, _ = converted(plan_folder(tmp_path / "in", channels=["MRI"]), tmp_path)
    written = nibabel.load(target / "imagesTr" / "scan_0000.nii.gz")
    np.testing.assert_allclose(written.affine, nibabel.load(source).affine, atol=1e-5)


def test_trailing_axis_of_one_volume_is_dropped(tmp_path):
    path = write(tmp_path / "in" / "scan.nii.gz", voxels())
    original = nibabel.load(path)
    nibabel.save(nibabel.Nifti1Image(original.get_fdata(dtype=np.float32)[..., None], original.affine), path)
    assert nibabel.load(path).shape == (14, 12, 10, 1)
    target, _ = converted(plan_folder(tmp_path / "in", channels=["MRI"]), tmp_path)
    assert_same_image(target / "imagesTr" / "scan_0000.nii.gz", voxels())
    assert nibabel.load(target / "imagesTr" / "scan_0000.nii.gz").shape == (14, 12, 10)


def test_dicom_series_in_hounsfield_units(tmp_path):
    first = dicom_series(tmp_path / "in" / "p1")
    dicom_series(tmp_path / "in" / "deep" / "p2", suffix="", start=7)
    planned = plan_folder(tmp_path / "in")
    assert planned.channel_names == ("CT",)
    target, _ = converted(planned, tmp_path)
    assert {"imagesTr/p1_0000.nii.gz", "imagesTr/p2_0000.nii.gz"} <= files_below(target)
    found = sitk.ReadImage(str(target / "imagesTr" / "p1_0000.nii.gz"))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(found), first)
    np.testing.assert_allclose(found.GetSpacing(), (0.5, 0.75, 2.5), rtol=1e-6)
    np.testing.assert_allclose(found.GetOrigin(), (-40.5, 7, -100), rtol=1e-6)


def test_dicom_folder_itself_is_the_case(tmp_path):
    dicom_series(tmp_path / "patient", modality="MR")
    planned = plan_folder(tmp_path / "patient")
    assert [case.identifier for case in planned.cases] == ["patient"]
    assert planned.channel_names == ("MRI",)


def test_folder_here_is_named_as_the_folder(tmp_path, monkeypatch):
    dicom_series(tmp_path / "patient")
    monkeypatch.chdir(tmp_path / "patient")
    assert [case.identifier for case in plan_folder(Path(".")).cases] == ["patient"]


def test_dicom_files_that_end_in_dicom(tmp_path):
    dicom_series(tmp_path / "p1", suffix=".dicom")
    assert [len(case.channels[0].files) for case in plan_folder(tmp_path).cases] == [6]


def test_dicom_slices_with_a_rescaling_each(tmp_path):
    import pydicom

    expected = dicom_series(tmp_path / "in" / "p1", modality="PT").astype(np.float32)
    for path in (tmp_path / "in" / "p1").iterdir():
        slice_ = pydicom.dcmread(path)
        z = 6 - slice_.InstanceNumber
        slice_.RescaleSlope, slice_.RescaleIntercept = (1 + 0.25 * z), 0
        expected[z] = (expected[z] + 1024) * (1 + 0.25 * z)
        slice_.save_as(path)
    target, _ = converted(plan_folder(tmp_path / "in"), tmp_path)
    found = sitk.GetArrayFromImage(sitk.ReadImage(str(target / "imagesTr" / "p1_0000.nii.gz")))
    np.testing.assert_array_equal(found, expected)


def test_hidden_folders_are_left_out_and_linked_ones_are_not(tmp_path):
    for hidden in (".git/annex/objects", ".snapshots"):
        write(tmp_path / "in" / hidden / "old.nii.gz", voxels())
        dicom_series(tmp_path / "in" / hidden / "series")
    write(tmp_path / "elsewhere" / "b.nii.gz", voxels(1))
    write(tmp_path / "in" / "a.nii.gz", voxels())
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "circle").symlink_to(tmp_path / "in")
    assert [case.identifier for case in plan_folder(tmp_path / "in", channels=["MRI"]).cases] == ["a", "b"]
    anat = write(tmp_path / "bids" / "sub-1" / ".git" / "anat" / "sub-1_T1w.nii.gz", voxels()).parent
    (tmp_path / "bids" / "sub-2").mkdir()
    (tmp_path / "bids" / "sub-2" / "anat").symlink_to(anat)
    (case,) = plan_bids(tmp_path / "bids").cases
    assert case.channels[0].path.parent == tmp_path / "bids" / "sub-2" / "anat"


def test_labels_that_are_links_below_the_images(tmp_path):
    images, labels = labelled_folder(tmp_path, ("a",))
    (images / "labels").mkdir()
    (images / "labels" / "a.nii.gz").symlink_to(labels / "a.nii.gz")
    planned = plan_folder(images, channels=["MRI"], labels=images / "labels")
    assert [case.label.path for case in planned.cases] == [images / "labels" / "a.nii.gz"] and not planned.problems


def test_images_below_the_folder_of_labels(tmp_path):
    write(tmp_path / "all" / "images" / "a.nii.gz", voxels())
    write(tmp_path / "all" / "a_seg.nii.gz", label())
    given = {"channels": ["MRI"], "labels": tmp_path / "all"}
    (case,) = plan_folder(tmp_path / "all" / "images", **given, label_suffix="_seg").cases
    assert case.label.path == tmp_path / "all" / "a_seg.nii.gz"
    with pytest.raises(NnsslError, match="images and labels lie in one folder"):
        plan_folder(tmp_path / "all" / "images", **given)


def test_channels_by_given_suffixes_with_labels_beside_them(tmp_path):
    for case in ("p1", "p2"):
        for seed, suffix in enumerate(("_t1", "_t1ce", "_seg", "_notes")):
            array = label() if suffix == "_seg" else voxels(seed)
            write(tmp_path / "in" / case / f"{case}{suffix}.nii.gz", array)
    planned = plan_folder(
        tmp_path / "in",
        channels=["T1", "T1ce"],
        channel_suffixes=["_t1", "_t1ce"],
        labels=tmp_path / "in",
        label_suffix="_seg",
    )
    assert planned.notes == ("2 file(s) without any of the suffixes _t1, _t1ce are left out",)
    target, description = converted(planned, tmp_path)
    assert_same_image(target / "imagesTr" / "p2_0001.nii.gz", voxels(1))
    assert_same_image(target / "labelsTr" / "p1.nii.gz", label())
    assert description["channel_names"] == {"0": "T1", "1": "T1ce"}
    assert description["labels"] == {"background": 0, "label_1": 1, "label_2": 2}


def test_numbered_names_are_channels_only_if_they_look_like_it(tmp_path):
    def names(*stems):
        folder = tmp_path / "_".join(stems)
        for stem in stems:
            write(folder / f"{stem}.nii.gz", voxels())
        return [case.identifier for case in plan_folder(folder, channels=["MRI"] * (len(stems) // 2 or 1)).cases]

    assert names("a_0000", "a_0001", "b_0000", "b_0001") == ["a", "b"]
    assert names("a_0000") == ["a"]
    folder = tmp_path / "numbered"
    for number in range(3):
        write(folder / f"scan_{number:04d}.nii.gz", voxels())
    assert [c.identifier for c in plan_folder(folder, channels=["MRI"]).cases] == [
        "scan_0000",
        "scan_0001",
        "scan_0002",
    ]


def test_the_way_out_where_numbers_tell_cases_apart(tmp_path):
    for name in ("siteA_0000", "siteA_0001", "siteA_0002", "siteB_0000", "siteB_0001"):
        write(tmp_path / f"{name}.nii.gz", voxels())
    with pytest.raises(NnsslError) as caught:
        plan_folder(tmp_path, channels=["CT"])
    assert 'numbers tell cases apart and not channels, set --channel-suffixes ""' in caught.value.fix
    (problem,) = plan_folder(tmp_path, channels=["a", "b", "c"]).problems
    assert "no channel _0002" in problem.what and '--channel-suffixes ""' in problem.fix
    planned = plan_folder(tmp_path, channels=["CT"], channel_suffixes=[""])
    assert len(planned.cases) == 5 and planned.cases[0].identifier == "siteA_0000" and not planned.problems


def test_rounded_label_header_is_set_to_the_images(tmp_path):
    images, labels = labelled_folder(tmp_path, ("a",))
    write(labels / "a.nii.gz", label(), origin=(-11.5, 20.251, -300.0))
    done = convert(plan_folder(images, channels=["MRI"], labels=labels), tmp_path / "Dataset001_Demo")
    assert done.cases[0].notes == "label header rounded to the image's"
    assert_same_image(tmp_path / "Dataset001_Demo" / "labelsTr" / "a.nii.gz", label())


def bids_tree(root: Path) -> Path:
    for subject in ("sub-01", "sub-02"):
        for session in ("ses-a", "ses-b"):
            for seed, suffix in enumerate(("T1w", "FLAIR")):
                folder = root / subject / session
                write(folder / "anat" / f"{subject}_{session}_{suffix}.nii.gz", voxels(seed))
            write(folder / "anat" / f"{subject}_{session}_space-T1w_mask.nii.gz", label())
            write(folder / "func" / f"{subject}_{session}_task-rest_bold.nii.gz", voxels(3))
    write(root / "derivatives" / "x" / "sub-01" / "anat" / "sub-01_T1w.nii.gz", voxels())
    return root


def test_bids_images_are_cases_or_channels(tmp_path):
    root = bids_tree(tmp_path / "bids")
    planned = plan_bids(root)
    assert len(planned.cases) == 8 and planned.channel_names == ("MRI",)
    assert planned.cases[0].identifier == "sub-01_ses-a_FLAIR"
    assert len(plan_bids(root, suffixes=["T1w"]).cases) == 4
    together = plan_bids(root, suffixes=["T1w", "FLAIR"], together=True)
    assert [case.identifier for case in together.cases][:2] == ["sub-01_ses-a", "sub-01_ses-b"]
    target, description = converted(together, tmp_path)
    assert description["channel_names"] == {"0": "T1w", "1": "FLAIR"}
    assert_same_image(target / "imagesTr" / "sub-02_ses-b_0001.nii.gz", voxels(1))
    assert "case_modalities" not in description  # every case shows the same


def test_cases_of_several_modalities_are_told_apart_in_dataset_json(tmp_path):
    write(tmp_path / "bids" / "sub-01" / "anat" / "sub-01_T1w.nii.gz", voxels())
    write(tmp_path / "bids" / "sub-01" / "anat" / "sub-01_T2w.nii.gz", voxels(1))
    write(tmp_path / "bids" / "sub-01" / "ct" / "sub-01_ct.nii.gz", voxels(2))
    _, description = converted(plan_bids(tmp_path / "bids", channels=["MRI"]), tmp_path / "a")
    assert description["case_modalities"] == {"sub-01_T1w": "T1w", "sub-01_T2w": "T2w", "sub-01_ct": "CT"}
    dicom_series(tmp_path / "dicom" / "p1")
    dicom_series(tmp_path / "dicom" / "p2", modality="MR")
    _, description = converted(plan_folder(tmp_path / "dicom", channels=["scan"]), tmp_path / "b")
    assert description["case_modalities"] == {"p1": "CT", "p2": "MRI"}
    images = {
        name: {
            "name": f"{name}.nii.gz",
            "modality": name,
            "image_path": str(tmp_path / "bids" / "sub-01" / "anat" / file),
        }
        for name, file in (("T1w", "sub-01_T1w.nii.gz"), ("FLAIR", "sub-01_T2w.nii.gz"))
    }
    sessions = {"s": {"images": list(images.values())}}
    collection = {"dataset_index": 1, "subjects": {"p": {"sessions": sessions}}}
    (tmp_path / "pretrain_data.json").write_text(json.dumps({"collection_name": "C", "datasets": {"1": collection}}))
    _, planned = plan_collection(tmp_path)
    _, description = converted(planned, tmp_path / "c")
    assert description["case_modalities"] == {"C__1__p__s__T1w": "T1w", "C__1__p__s__FLAIR": "FLAIR"}


def test_bids_problems(tmp_path):
    root = bids_tree(tmp_path / "bids")
    (root / "sub-02" / "ses-b" / "anat" / "sub-02_ses-b_FLAIR.nii.gz").unlink()
    problems = plan_bids(root, suffixes=["T1w", "FLAIR"], together=True).problems
    assert [p.what for p in problems] == [
        f"case sub-02_ses-b: 1 T1w, 0 FLAIR image(s) where one of each is needed in {root}"
    ]
    with pytest.raises(NnsslError, match=r"unknown BIDS suffix .* 'T1'") as caught:
        plan_bids(root, suffixes=["T1"])
    assert "did you mean 'T1w'?" in str(caught.value)
    write(root / "sub-01" / "ses-a" / "ct" / "sub-01_ses-a_ct.nii.gz", voxels())
    with pytest.raises(NnsslError, match="mixes modalities: CT and MRI"):
        plan_bids(root)
    with pytest.raises(NnsslError, match="give the root of a BIDS tree"):
        plan_bids(tmp_path)


def test_nnssl_collection_there_and_back(tmp_path, monkeypatch):
    images, _ = labelled_folder(tmp_path, ("p1_a", "p1_b", "p2_a"))
    target, _ = converted(plan_folder(images, channels=["CT"]), tmp_path)
    monkeypatch.setenv("nnssl_raw", str(tmp_path / "raw"))
    content = export_collection(target, subject_pattern="^p[0-9]+")
    assert content["collection_index"] == 1 and content["collection_name"] == "Dataset001_Demo"
    subjects = content["datasets"]["001"]["subjects"]
    assert {name: list(subject["sessions"]) for name, subject in subjects.items()} == {
        "p1": ["p1_a", "p1_b"],
        "p2": ["p2_a"],
    }
    assert subjects["p2"]["sessions"]["p2_a"]["images"] == [
        {
            "name": "p2_a_0000.nii.gz",
            "modality": "CT",
            "image_path": "$nnssl_raw/Dataset001_Demo/imagesTr/p2_a_0000.nii.gz",
            "image_info": {},
            "associated_masks": None,
        }
    ]
    listing = tmp_path / "pretrain_data.json"
    listing.write_text(json.dumps(content))
    name, planned = plan_collection(listing)
    assert name == "Dataset001_Demo" and planned.channel_names == ("CT",)
    assert planned.cases[0].identifier == "Dataset001_Demo__001__p1__p1_a__p1_a_0000"
    convert(planned, tmp_path / "Dataset002_Back")
    back = tmp_path / "Dataset002_Back" / "imagesTr" / "Dataset001_Demo__001__p2__p2_a__p2_a_0000_0000.nii.gz"
    assert back.read_bytes() == (images / "p2_a.nii.gz").read_bytes()
    monkeypatch.delenv("nnssl_raw")
    with pytest.raises(NnsslError, match="environment variable nnssl_raw is not set"):
        plan_collection(listing)
    listing.write_text('{"collection_name": "x", "datasets": {"1": {}}}')
    with pytest.raises(NnsslError, match="is no nnssl collection"):
        plan_collection(listing)


def test_nnssl_export_of_files_that_are_no_cases(tmp_path):
    images, _ = labelled_folder(tmp_path, ("a",))
    target, _ = converted(plan_folder(images, channels=["CT"]), tmp_path)
    (target / "imagesTr" / "._a_0000.nii.gz").write_bytes(b"what macOS leaves behind")
    assert list(export_collection(target)["datasets"]["001"]["subjects"]) == ["a"]
    for name in ("old_seg", "a_0001"):  # the second: no such channel
        path = write(target / "imagesTr" / f"{name}.nii.gz", voxels())
        with pytest.raises(NnsslError, match=r"is no CASE_0000.nii.gz of a channel in dataset.json \(0\)") as caught:
            export_collection(target)
        assert str(path) in caught.value.what
        path.unlink()


def image_only(tmp_path: Path, ending: str = ".nii.gz", listing: bool = True) -> Path:
    dataset = tmp_path / "Dataset009_Unlabelled"
    for seed, name in enumerate("ab"):
        write(dataset / "imagesTr" / f"{name}_0000{ending}", voxels(seed))
    if listing:
        (dataset / "dataset.json").write_text(
            json.dumps({"channel_names": {"0": "CT"}, "file_ending": ending, "licence": "CC0"})
        )
    return dataset


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd"])
def test_foreground_completes_an_image_only_dataset(tmp_path, ending):
    dataset = image_only(tmp_path, ending)
    before = {path: path.read_bytes() for path in (dataset / "imagesTr").iterdir()}
    add_foreground(dataset)
    assert {path: path.read_bytes() for path in (dataset / "imagesTr").iterdir()} == before
    assert files_below(dataset / "labelsTr") == {f"a{ending}", f"b{ending}"}
    assert_same_image(dataset / "labelsTr" / f"a{ending}", np.ones(voxels().shape, np.uint8))
    assert json.loads((dataset / "dataset.json").read_text()) == {
        "channel_names": {"0": "CT"},
        "file_ending": ending,
        "licence": "CC0",
        "labels": {"background": 0, "foreground": 1},
        "numTraining": 2,
    }
    with pytest.raises(NnsslError, match="has labels already"):
        add_foreground(dataset)


def test_foreground_without_listing_needs_channels(tmp_path):
    dataset = image_only(tmp_path, listing=False)
    with pytest.raises(NnsslError, match="name them: --channels CT"):
        add_foreground(dataset)
    add_foreground(dataset, channels=["CT"])
    assert json.loads((dataset / "dataset.json").read_text())["channel_names"] == {"0": "CT"}


def test_foreground_that_cannot_be_found(tmp_path):
    dataset = image_only(tmp_path)
    before = files_below(dataset)
    bad = write(dataset / "imagesTr" / "c_0000.nii.gz", np.full_like(voxels(), 5))
    listing = (dataset / "dataset.json").read_text()
    with pytest.raises(NnsslError) as caught:
        add_foreground(dataset)
    assert f"case c: {bad}: constant image, all voxels equal 5.0" in str(caught.value)
    assert files_below(dataset) == before | {"imagesTr/c_0000.nii.gz"}
    assert (dataset / "dataset.json").read_text() == listing
    add_foreground(dataset, skip_bad=True)
    assert files_below(dataset) == before | {"imagesBad/c_0000.nii.gz", "labelsTr/a.nii.gz", "labelsTr/b.nii.gz"}
    assert json.loads((dataset / "dataset.json").read_text())["numTraining"] == 2


def test_foreground_dry_run_writes_nothing(tmp_path):
    dataset = image_only(tmp_path)
    before = {path: path.read_bytes() for path in dataset.rglob("*") if path.is_file()}
    done = add_foreground(dataset, dry_run=True, limit=1)
    assert [case.identifier for case in done.cases] == ["a"]
    assert {path: path.read_bytes() for path in dataset.rglob("*") if path.is_file()} == before
    with pytest.raises(NnsslError, match="use --limit with --dry-run only"):
        add_foreground(dataset, limit=1)
