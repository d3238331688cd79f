"""What is body, black and white: restated Hounsfield units for CT, a look at the case for anything else."""

import math

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.preprocessing.normalization.default_normalization_schemes import CTNormalization
from preprocessed_cases import save_case
from tiny_dataset import plans_of

from nnssl_ext.contracts import HounsfieldScale
from nnssl_ext.data.cases import list_cases
from nnssl_ext.data.foreground import foreground_mask
from nnssl_ext.data.intensity_scale import ScaleSettings, intensity_scale
from nnssl_ext.plans import pretrain_plan
from nnssl_ext.records import Case

PROPERTIES = {"mean": 70.0, "std": 200.0, "percentile_00_5": -900.0, "percentile_99_5": 1200.0}
NO_FILE = "a case whose file is not there"


def case_of(folder, image: np.ndarray) -> Case:
    save_case(folder, "case", image[None].astype(np.float32))
    return list_cases(folder, (1.0, 1.0, 1.0))[0]


def test_plans_say_how_a_ct_is_normalised_and_nothing_of_other_channels():
    plans = plans_of("ResEncTiny")
    assert pretrain_plan(plans, "3d_fullres", 1).hounsfield == (None,)
    plans["foreground_intensity_properties_per_channel"] = {"0": PROPERTIES}
    assert pretrain_plan(plans, "3d_fullres", 1).hounsfield == (None,)  # z-scored: a unit is no longer so many HU
    plans["configurations"]["3d_fullres"]["normalization_schemes"] = ["CTNormalization"]
    assert pretrain_plan(plans, "3d_fullres", 1).hounsfield == (HounsfieldScale(70.0, 200.0, -900.0, 1200.0),)


def test_hounsfield_units_are_those_of_nnunets_normalisation(tmp_path):
    scale = HounsfieldScale(70.0, 200.0, -900.0, 1200.0)
    case = Case(NO_FILE, tmp_path, 1, (9, 9, 9), (1.0, 1.0, 1.0))
    found = intensity_scale(case, ScaleSettings(), scale)
    hu = np.array([-500.0, -899.0, 1000.0], np.float32)
    normalised = CTNormalization(use_mask_for_norm=False, intensityproperties=PROPERTIES).run(hu[None], None)[0]
    assert found.body == pytest.approx(normalised[0]) and found.white == pytest.approx(normalised[2])
    assert found.black == pytest.approx((-1350 - 70) / 200)  # where the plans clip, nothing is darker
    assert found.hounsfield


def test_air_clipped_away_by_the_plans_is_no_body(tmp_path):
    case = Case(NO_FILE, tmp_path, 1, (9, 9, 9), (1.0, 1.0, 1.0))
    abdomen = {**PROPERTIES, "percentile_00_5": -160.0}
    found = intensity_scale(case, ScaleSettings(), HounsfieldScale(70.0, 200.0, -160.0, 1200.0))
    air = CTNormalization(use_mask_for_norm=False, intensityproperties=abdomen).run(
        np.float32([[-1000.0, -100.0]]), None
    )
    assert air[0, 0] <= found.body < air[0, 1]


def test_a_threshold_on_the_way_from_black_to_white(tmp_path):
    ramp = np.broadcast_to(np.arange(40.0), (40, 40, 40))
    found = intensity_scale(case_of(tmp_path, ramp), ScaleSettings(percentiles=(0.0, 100.0), body_share=0.3), None)
    assert (found.black, found.white) == (pytest.approx(0, abs=1), pytest.approx(39, abs=1))
    assert found.body == pytest.approx(found.black + 0.3 * (found.white - found.black))
    assert not found.hounsfield


def test_a_case_without_air_is_body_everywhere_but_in_its_padding(tmp_path):
    rng = np.random.default_rng(0)
    tissue = rng.normal(0, 1, (30, 30, 30))
    assert intensity_scale(case_of(tmp_path / "a", tissue), ScaleSettings(), None).body == -math.inf
    tissue[:10] = -9
    assert intensity_scale(case_of(tmp_path / "b", tissue), ScaleSettings(), None).body == pytest.approx(-9)
    flat = np.zeros((30, 30, 30))
    assert intensity_scale(case_of(tmp_path / "c", flat), ScaleSettings(), None).body == -math.inf


def test_cases_thinner_than_a_cube(tmp_path):
    image = np.random.default_rng(0).normal(size=(2, 30, 1))
    assert intensity_scale(case_of(tmp_path, image), ScaleSettings(), None).black == pytest.approx(image.min(), abs=1)


@pytest.mark.parametrize("name", ["example_ct", "example_mr_sm"])
def test_a_look_finds_the_body_that_planning_finds(test_data, tmp_path, name):
    image = sitk.GetArrayFromImage(sitk.ReadImage(str(test_data / "ct_mr_examples" / f"{name}.nii.gz"))).astype(
        np.float32
    )
    image = (image - image.mean()) / image.std()
    wanted = foreground_mask(image)
    found = image > intensity_scale(case_of(tmp_path, image), ScaleSettings(), None).body
    dice = 2 * (found & wanted).sum() / (found.sum() + wanted.sum())
    assert 0.2 < wanted.mean() < 0.95 and dice > 0.85  # lungs and bowel are filled in the one, not in the other
