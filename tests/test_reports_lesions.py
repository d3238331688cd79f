"""Lesion-wise detection: hand cases, a brute-force twin of the matching, and the command on files."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st

from nnssl_ext.cli.lesions import main
from nnssl_ext.errors import NnsslError
from nnssl_ext.reports.lesions import detect, summarise_detection

UNIT = (1.0, 1.0, 1.0)


def mask(*boxes, shape=(10, 12, 14)):
    """True in boxes ((z0, z1), (y0, y1), (x0, x1))."""
    found = np.zeros(shape, bool)
    for box in boxes:
        found[tuple(slice(*edge) for edge in box)] = True
    return found


A, B, C = ((0, 2), (0, 2), (0, 2)), ((5, 8), (5, 8), (5, 8)), ((0, 2), (9, 11), (10, 13))


def test_by_hand():
    """Truth: 8 and 27 voxels. Prediction: half of the first (IoU 4/8), nothing of the second, and 12 voxels elsewhere."""
    half = ((0, 1), (0, 2), (0, 2))
    case = detect(mask(A, B), mask(half, C), (2.0, 1.0, 0.5))
    assert (len(case.truth), len(case.predicted), case.found, case.false_positives) == (2, 2, 1, 1)
    assert [lesion.volume for lesion in case.truth] == [8.0, 27.0]  # a voxel is 1 mm^3
    assert case.truth[0].centre == (1.0, 0.5, 0.25) and case.truth[0].iou == 0.5 == case.predicted[0].iou
    assert case.truth[1].iou == 0 == case.predicted[1].iou
    assert case.dice == pytest.approx(2 * 4 / (35 + 16))
    told = summarise_detection([case, detect(mask(), mask(), UNIT), detect(mask(B), mask(B), UNIT)])
    assert told["sensitivity"] == pytest.approx(2 / 3) and told["precision"] == pytest.approx(2 / 3)
    assert told["false_positives_per_case"] == pytest.approx(1 / 3) and (told["cases"], told["lesions"]) == (3, 3)
    assert told["dice"] == pytest.approx((8 / 51 + 1) / 2)  # the healthy case has none


def test_iou_decides_and_at_the_threshold_counts():
    truth, tenth = mask(((0, 1), (0, 1), (0, 10))), mask(((0, 1), (0, 1), (0, 1)))
    assert detect(truth, tenth, UNIT, least_iou=0.1).found == 1
    assert detect(truth, tenth, UNIT, least_iou=0.11).found == 0


def test_one_prediction_over_two_lesions_finds_one():
    truth = mask(((0, 1), (0, 1), (0, 4)), ((0, 1), (0, 1), (6, 12)))
    case = detect(truth, mask(((0, 1), (0, 1), (0, 12))), UNIT)
    assert (case.found, case.false_positives) == (1, 0)
    assert [lesion.iou for lesion in case.truth] == [0, 0.5]  # the better of the two


def test_the_number_of_pairs_goes_before_their_overlap():
    """Greedy matching of the largest IoU (0.6) would leave one lesion without partner; two pairs are possible."""
    line = np.zeros((1, 1, 30), bool)
    truth, predicted = line.copy(), line.copy()
    truth[..., 0:12], truth[..., 13:15] = True, True
    predicted[..., 0:2], predicted[..., 3:15] = True, True
    case = detect(truth, predicted, UNIT)
    assert case.found == 2 and case.false_positives == 0


def test_touching_at_a_corner_is_one_lesion_and_small_ones_can_be_left_out():
    corner = mask(A, ((2, 3), (2, 3), (2, 3)))
    assert len(detect(corner, corner, UNIT).truth) == 1
    case = detect(mask(A, B), mask(A, B), UNIT, least_volume=10.0)
    assert len(case.truth) == len(case.predicted) == 1 and case.dice == 1


def test_nothing_to_say_is_none_not_zero():
    healthy = detect(mask(), mask(), UNIT)
    assert math.isnan(healthy.dice)
    told = summarise_detection([healthy])
    assert told["sensitivity"] is None and told["precision"] is None and told["dice"] is None
    assert summarise_detection([detect(mask(), mask(A), UNIT)])["precision"] == 0
    with pytest.raises(NnsslError, match="no case"):
        summarise_detection([])
    with pytest.raises(NnsslError, match="makes no pair"):
        detect(mask(), mask(), UNIT, least_iou=0.0)


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.sampled_from([0.05, 0.1, 0.3, 0.6]))
def test_the_matching_is_the_best_of_all(seed, least):
    """Against every assignment there is, on random segmentations of a line, components found by hand."""
    rng = np.random.default_rng(seed)

    def runs():
        return np.repeat(rng.random(12) < 0.6, rng.integers(1, 4, 12))[:24]

    a, b = (np.pad(r, (0, 24 - len(r))) for r in (runs(), runs()))

    def pieces(line):
        return [{i for i, _ in g} for on, g in itertools.groupby(enumerate(line), key=lambda p: p[1]) if on]

    left, right = pieces(a), pieces(b)
    iou = {(i, j): len(p & q) / len(p | q) for i, p in enumerate(left) for j, q in enumerate(right)}
    best = (0, 0.0)
    columns = [*range(len(right)), *[None] * len(left)]
    for chosen in set(itertools.permutations(columns, len(left))) if len(left) <= 4 and len(right) <= 4 else ():
        kept = [iou[i, j] for i, j in enumerate(chosen) if j is not None and iou[i, j] >= least]
        best = max(best, (len(kept), sum(kept)))
    case = detect(a[None, None], b[None, None], UNIT, least_iou=least)
    assert (len(case.truth), len(case.predicted)) == (len(left), len(right))
    if len(left) <= 4 and len(right) <= 4:
        assert (case.found, sum(x.iou for x in case.truth)) == (best[0], pytest.approx(best[1]))


@pytest.fixture
def folders(tmp_path, monkeypatch, capsys):
    for part, boxes in (("truth", (A, B)), ("predicted", (A, C))):
        (tmp_path / part).mkdir()
        for case in ("one", "two"):
            image = sitk.GetImageFromArray(mask(*boxes).astype(np.uint8) * 2)
            image.SetSpacing((0.5, 1.0, 2.0))
            sitk.WriteImage(image, str(tmp_path / part / f"{case}.nii.gz"))

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["nnssl_lesions", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, capsys.readouterr()

    return tmp_path, run


def test_the_command(folders):
    folder, run = folders
    code, told = run(folder / "predicted", folder / "truth", "-l", 2, "-o", folder / "lesions.json")
    assert code == 0 and "sensitivity: 0.500" in told.out and "false positives per case: 1.000" in told.out
    written = json.loads((folder / "lesions.json").read_text())
    assert written["found"] == 2 and set(written["per_case"]) == {"one", "two"}
    code, told = run(folder / "predicted", "-l", 2)
    assert code == 0 and "one: 2 lesion(s), 20 mm^3" in told.out  # 8 + 12 voxels of 1 mm^3


def test_the_command_tells_what_does_not_count_and_writes_strict_json(folders):
    folder, run = folders
    empty = sitk.GetImageFromArray(mask().astype(np.uint8))
    for part, name in (("truth", "missed"), ("truth", "none"), ("predicted", "none")):
        sitk.WriteImage(empty, str(folder / part / f"{name}.nii.gz"))
    (folder / "predicted" / "._one.nii.gz").write_bytes(b"macOS")
    code, told = run(folder / "predicted", folder / "truth", "-l", 2, "-o", folder / "lesions.json")
    assert code == 0 and "1 label map(s)" in told.out and "missed" in told.out

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    written = json.loads((folder / "lesions.json").read_text(), parse_constant=refuse)
    assert written["without_prediction"] == ["missed"] and written["per_case"]["none"]["dice"] is None


def test_the_command_names_mistakes(folders):
    folder, run = folders
    (folder / "flat").mkdir()
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((4, 4), np.uint8)), str(folder / "flat" / "one.nii.gz"))
    assert "one.nii.gz has 2 dimensions" in run(folder / "flat")[1].err
    moved = sitk.ReadImage(str(folder / "truth" / "two.nii.gz"))
    moved.SetOrigin((1, 0, 0))
    sitk.WriteImage(moved, str(folder / "truth" / "two.nii.gz"))
    code, told = run(folder / "predicted", folder / "truth", "-l", 2)
    assert code == 2 and "case two.nii.gz: prediction and truth lie on different grids" in told.err
    (folder / "truth" / "two.nii.gz").unlink()
    assert "no label map" in run(folder / "predicted", folder / "truth")[1].err
    assert "no *.nii.gz in" in run(folder)[1].err
