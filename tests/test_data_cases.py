"""Finding and reading preprocessed cases, good and bad."""

import json
from pathlib import Path

import numpy as np
import pytest
from preprocessed_cases import coordinate_volume, save_case

from nnssl_ext.data.cases import list_cases
from nnssl_ext.data.regions import read_region
from nnssl_ext.errors import NnsslError

SPACING = (2.0, 0.5, 0.75)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "Dataset007_Thing" / "nnsslPrimusTinyPlans_3d_fullres"
    save_case(path, "case_b", coordinate_volume((12, 40, 36)), (8, 16, 16))
    save_case(path, "case_a", coordinate_volume((9, 21, 30)), (8, 16, 16))
    return path


def test_cases_are_sorted_and_described(folder):
    a, b = list_cases(folder, SPACING)
    assert (a.identifier, a.channels, a.shape, a.spacing) == ("case_a", 3, (9, 21, 30), SPACING)
    assert (b.identifier, b.shape) == ("case_b", (12, 40, 36))
    assert [case.identifier for case in list_cases(folder, SPACING, only=["case_b"])] == ["case_b"]


def test_modality_is_the_cases_own_or_that_of_all_channels(folder):
    assert [case.modality for case in list_cases(folder, SPACING)] == ["", ""]
    description = {"channel_names": {"0": "T1", "1": "T2"}, "case_modalities": {"case_b": "CT"}}
    (folder.parent / "dataset.json").write_text(json.dumps(description))
    assert [case.modality for case in list_cases(folder, SPACING)] == ["T1+T2", "CT"]


@pytest.mark.parametrize(
    ("lower", "upper", "expected"),
    [
        ((2, 5, 7), (9, 30, 20), ((2, 5, 7), (9, 30, 20))),
        ((-3, -1, 0), (50, 50, 50), ((0, 0, 0), (12, 40, 36))),
        ((20, 50, -9), (22, 52, -5), ((11, 39, 0), (12, 40, 1))),  # outside: one voxel of the border
    ],
)
def test_region_holds_the_voxels_it_names(folder, lower, upper, expected):
    (case,) = list_cases(folder, SPACING, only=["case_b"])
    region = read_region(case, lower, upper)
    begin, end = expected
    assert region.lower == begin and region.voxels.dtype == np.float32
    np.testing.assert_array_equal(region.voxels, coordinate_volume(case.shape)[(slice(None), *map(slice, begin, end))])


def test_missing_folder_names_the_command(tmp_path):
    with pytest.raises(NnsslError, match=r"nnUNetv2_preprocess -d 4 -plans_name somePlans -c 3d_lowres"):
        list_cases(tmp_path / "Dataset004_Hippocampus" / "somePlans_3d_lowres", SPACING)


def test_old_format_is_named(tmp_path):
    np.savez(tmp_path / "case.npz", data=np.zeros(3))
    with pytest.raises(NnsslError, match=r"\.npz/\.npy files of an old nnU-Net"):
        list_cases(tmp_path, SPACING)


def test_empty_folder_and_empty_selection(tmp_path, folder):
    with pytest.raises(NnsslError, match="no preprocessed case"):
        list_cases(tmp_path, SPACING)
    with pytest.raises(NnsslError, match="selection of cases is empty"):
        list_cases(folder, SPACING, only=[])


def test_unknown_case_gets_the_nearest_name(folder):
    with pytest.raises(NnsslError, match="did you mean 'case_a'"):
        list_cases(folder, SPACING, only=["case_aa"])


def test_truncated_file_is_named(folder):
    path = folder / "case_a.b2nd"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(NnsslError, match=r"case case_a: cannot read .*case_a\.b2nd(.|\n)*nnUNetv2_preprocess -d 7"):
        list_cases(folder, SPACING)


def test_damage_behind_the_header_is_named_when_read(folder):
    path = folder / "case_b.b2nd"
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle - 2000 : middle + 2000] = np.random.default_rng(0).bytes(4000)
    path.write_bytes(content)
    (case,) = list_cases(folder, SPACING, only=["case_b"])
    with pytest.raises(NnsslError, match=r"case case_b: cannot read .*case_b\.b2nd"):
        read_region(case, (0, 0, 0), case.shape)


def test_a_case_that_vanished_or_was_replaced_is_named(folder):
    a, b = list_cases(folder, SPACING)
    (folder / "case_a.b2nd").unlink()
    with pytest.raises(NnsslError, match="case case_a: cannot read"):
        read_region(a, (0, 0, 0), (4, 4, 4))
    for path in folder.glob("case_b*"):
        path.unlink()
    save_case(folder, "case_b", coordinate_volume((5, 5, 5)))
    with pytest.raises(NnsslError, match=r"case case_b: .* its shape changed"):
        read_region(b, (0, 0, 0), (4, 4, 4))
