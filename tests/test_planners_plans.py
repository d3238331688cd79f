"""Planning in this process on small synthetic data sets."""

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import Workspace
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnssl_ext.errors import NnsslError
from nnssl_ext.planners.fingerprint import FILE, analyse_case
from nnssl_ext.planners.overrides import Overrides
from nnssl_ext.planners.preview import describe
from nnssl_ext.planners.primus import nnsslPlannerPrimusM, nnsslPlannerPrimusS, nnsslPlannerPrimusTiny
from nnssl_ext.planners.resenc import nnsslPlannerResEncM, nnsslPlannerResEncTiny
from nnssl_ext.plans import configuration_of, pretrain_plan


def write_dataset(
    space: Workspace,
    shape: tuple[int, int, int],
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    channels: tuple[str, ...] = ("MRI",),
    cases: int = 3,
    labels: bool = True,
) -> Path:
    """A raw data set of noisy boxes; axes and spacing z, y, x."""
    raw = space.raw / "Dataset009_Boxes"
    rng = np.random.default_rng(0)
    for folder in ("imagesTr", "labelsTr") if labels else ("imagesTr",):
        (raw / folder).mkdir(parents=True)
    for case in range(cases):
        box = np.zeros(shape, np.float32)
        box[tuple(slice(edge // 5, -edge // 5) for edge in shape)] = 100
        for channel in range(len(channels)):
            write(raw / "imagesTr" / f"case{case}_{channel:04d}.nii.gz", box + rng.normal(10, 2, shape), spacing)
        if labels:
            write(raw / "labelsTr" / f"case{case}.nii.gz", (box > 0).astype(np.uint8), spacing)
    content = {
        "channel_names": {str(i): name for i, name in enumerate(channels)},
        "labels": {"background": 0, "box": 1},
        "numTraining": cases,
        "file_ending": ".nii.gz",
    }
    (raw / "dataset.json").write_text(json.dumps(content))
    preprocessed = space.preprocessed / raw.name
    preprocessed.mkdir()
    # the stock planner only asks that it exists; ours never reads it
    (preprocessed / "dataset_fingerprint.json").write_text("{}")
    return raw


def write(path: Path, array: np.ndarray, spacing: tuple[float, float, float]) -> None:
    image = sitk.GetImageFromArray(array.astype(np.float32) if array.dtype == np.float64 else array)
    image.SetSpacing(spacing[::-1])
    sitk.WriteImage(image, str(path))


def test_anisotropic_data_get_anisotropic_tokens(nnunet_env):
    write_dataset(nnunet_env, (32, 120, 120), (5.0, 1.0, 1.0))
    plans = nnsslPlannerPrimusS(9).plan_experiment()
    found = configuration_of(plans, "3d_fullres")
    assert found["spacing"] == [5.0, 1.0, 1.0]
    assert found["nnssl"]["token_size"] == [2, 8, 8]
    assert found["architecture"]["arch_kwargs"]["strides"] == [[1, 1, 1], [1, 2, 2], [1, 2, 2], [2, 2, 2]]
    assert found["patch_size"] == [32, 120, 120]
    plan = pretrain_plan(plans, "3d_fullres", channels=1)
    assert plan.global_crop == (32, 120, 120) and plan.local_crop == (16, 64, 64)
    assert plan.preset == "PrimusS"


def test_coarse_axis_comes_first_whatever_it_was(nnunet_env):
    write_dataset(nnunet_env, (60, 60, 14), (1.0, 1.0, 5.0))
    plans = nnsslPlannerPrimusTiny(9).plan_experiment()
    found = configuration_of(plans, "3d_fullres")
    assert plans["transpose_forward"] == [2, 0, 1]
    assert found["spacing"] == [5.0, 1.0, 1.0] and found["nnssl"]["token_size"] == [1, 4, 4]
    assert found["patch_size"] == [14, 60, 60]


def test_two_channels_are_normalised_each_by_its_name(nnunet_env):
    raw = write_dataset(nnunet_env, (24, 24, 24), channels=("CT", "PET"), cases=2)
    for case in range(2):
        path = raw / "imagesTr" / f"case{case}_0001.nii.gz"
        spiked = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
        spiked[12, 12, 12] = 1e4
        write(path, spiked, (1.0, 1.0, 1.0))
    plans = nnsslPlannerResEncTiny(9).plan_experiment()
    found = configuration_of(plans, "3d_fullres")
    assert found["normalization_schemes"] == ["CTNormalization", "nnsslPercentileNormalization"]
    reasons = found["nnssl"]["reasons"]
    assert "CT" in reasons["normalization of channel 0 (CT)"] and "100%" in reasons["normalization of channel 1 (PET)"]
    statistics = plans["foreground_intensity_properties_per_channel"]
    assert 90 < statistics["0"]["median"] < 130  # of the box, not of the air around it
    assert statistics["1"]["max"] == 1e4


@pytest.mark.parametrize("planner", [nnsslPlannerPrimusM, nnsslPlannerResEncM])
def test_volume_smaller_than_one_token_grid_still_plans(nnunet_env, planner):
    write_dataset(nnunet_env, (9, 11, 10))
    plans = planner(9).plan_experiment()
    found = configuration_of(plans, "3d_fullres")
    assert all(edge >= size for edge, size in zip(found["patch_size"], (9, 11, 10), strict=True))
    assert build(found)(np.zeros((1, 1, *found["patch_size"]), np.float32)) == tuple(found["patch_size"])


def test_volume_that_leaves_a_network_no_decoder_is_told_with_a_planner_that_copes(nnunet_env):
    write_dataset(nnunet_env, (9, 11, 10))
    with pytest.raises(NnsslError, match="single stage") as refused:
        nnsslPlannerResEncTiny(9).plan_experiment()
    assert "nnsslPlannerResEncM" in refused.value.fix


@pytest.mark.parametrize("planner", [nnsslPlannerPrimusTiny, nnsslPlannerResEncTiny, nnsslPlannerResEncM])
def test_crops_of_the_plan_pass_through_the_planned_network(nnunet_env, planner):
    write_dataset(nnunet_env, (20, 40, 30), (3.5, 1.0, 1.0), channels=("T1", "T2"))
    found = configuration_of(planner(9).plan_experiment(), "3d_fullres")
    forward = build(found, channels=2)
    for crop in (found["nnssl"]["global_crop"], found["nnssl"]["local_crop"]):
        assert forward(np.zeros((1, 2, *crop), np.float32)) == tuple(crop)


def build(configuration, channels=1):
    import torch
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    entry = configuration["architecture"]
    network = get_network_from_plans(
        entry["network_class_name"], entry["arch_kwargs"], entry["_kw_requires_import"], channels, 2, True, False
    ).eval()

    def forward(x: np.ndarray) -> tuple[int, ...]:
        with torch.no_grad():
            return tuple(network(torch.from_numpy(x)).shape[2:])

    return forward


def test_memory_target_spacing_and_name_are_honoured(nnunet_env):
    write_dataset(nnunet_env, (200, 200, 200), cases=2)
    small = configuration_of(nnsslPlannerPrimusM(9, gpu_memory_target_in_gb=8.0).make_plans(), "3d_fullres")
    large = configuration_of(nnsslPlannerPrimusM(9, gpu_memory_target_in_gb=24.0).make_plans(), "3d_fullres")
    assert np.prod(small["patch_size"]) < np.prod(large["patch_size"])
    for found, target in ((small, 8), (large, 24)):
        assert found["nnssl"]["memory_gb"]["estimate"] <= target == found["nnssl"]["memory_gb"]["target"]
    planner = nnsslPlannerPrimusS(9, overwrite_target_spacing=[2.0, 2.0, 2.0], plans_name="coarsePlans")
    plans = planner.plan_experiment()
    found = configuration_of(plans, "3d_fullres")
    assert found["spacing"] == [2.0, 2.0, 2.0] and found["nnssl"]["reasons"]["spacing"] == "asked for"
    assert found["data_identifier"] == "coarsePlans_3d_fullres"
    assert (nnunet_env.preprocessed / "Dataset009_Boxes" / "coarsePlans.json").is_file()


def test_batches_stay_small_on_small_images(nnunet_env):
    write_dataset(nnunet_env, (30, 30, 30), cases=12)
    for planner in (nnsslPlannerResEncM, nnsslPlannerPrimusM):
        found = configuration_of(planner(9).make_plans(), "3d_fullres")
        assert 2 <= found["batch_size"] <= 8 and 2 <= found["nnssl"]["batch_size"] <= 8
    assert configuration_of(nnsslPlannerResEncTiny(9).make_plans(), "3d_fullres")["batch_size"] == 2


def test_overrides(nnunet_env):
    write_dataset(nnunet_env, (40, 40, 40))
    planner = nnsslPlannerPrimusS(9)
    planner.overrides = Overrides(token_size=(2, 4, 4), patch_size=(20, 24, 32), batch_size=5)
    found = configuration_of(planner.make_plans(), "3d_fullres")
    assert found["patch_size"] == [20, 24, 32] and found["batch_size"] == found["nnssl"]["batch_size"] == 5
    planner.overrides = Overrides(patch_size=(20, 24, 30))
    with pytest.raises(NnsslError, match="no multiple of the token"):
        planner.make_plans()
    planner.overrides = Overrides(token_size=(3, 4, 4))
    with pytest.raises(NnsslError, match="powers of 2"):
        planner.make_plans()
    unet = nnsslPlannerResEncTiny(9)
    unet.overrides = Overrides(token_size=(8, 8, 8))
    with pytest.raises(NnsslError, match="no tokens"):
        unet.make_plans()
    unet.overrides = Overrides(patch_size=(4, 4, 4))
    with pytest.raises(NnsslError, match="single place of the deepest feature map"):
        unet.make_plans()


def test_the_supervised_batch_is_that_of_the_patch_asked_for(nnunet_env):
    """nnU-Net's own is for its own patch, of which two fit."""
    write_dataset(nnunet_env, (150, 150, 150))
    planner = nnsslPlannerResEncM(9)
    assert configuration_of(planner.make_plans(), "3d_fullres")["batch_size"] == 2
    planner.overrides = Overrides(patch_size=(32, 64, 64))
    found = configuration_of(planner.make_plans(), "3d_fullres")
    assert found["nnssl"]["batch_size"] == 8  # fit
    assert found["batch_size"] == round(0.05 * 3 * 150**3 / (32 * 64 * 64)) == 4  # nnU-Net's limit for small data sets


def test_planning_again_keeps_the_settings_of_fine_tuning(nnunet_env, capsys):
    write_dataset(nnunet_env, (20, 24, 28))
    plans = nnsslPlannerPrimusTiny(9).plan_experiment()
    file = nnunet_env.preprocessed / "Dataset009_Boxes" / "nnsslPrimusTinyPlans.json"
    file.write_text(json.dumps({**plans, "nnssl_finetuning": {"epochs": 7}}))
    nnsslPlannerPrimusTiny(9).plan_experiment()
    assert json.loads(file.read_text())["nnssl_finetuning"] == {"epochs": 7}
    assert "kept nnssl_finetuning" in capsys.readouterr().out


def test_files_that_lie_elsewhere_are_found_as_nnunet_finds_them(nnunet_env, monkeypatch):
    raw = write_dataset(nnunet_env, (20, 24, 28))
    content = json.loads((raw / "dataset.json").read_text())
    monkeypatch.setenv("SCANS", str(raw))
    content["dataset"] = {
        f"case{i}": {"images": [f"$SCANS/imagesTr/case{i}_0000.nii.gz"], "label": f"$SCANS/labelsTr/case{i}.nii.gz"}
        for i in range(3)
    }
    (raw / "dataset.json").write_text(json.dumps(content))
    assert nnsslPlannerPrimusTiny(9).make_plans()["plans_name"] == "nnsslPrimusTinyPlans"


def test_a_window_in_hounsfield_units_is_what_stock_nnunet_clips_to(nnunet_env):
    """The planned numbers through nnU-Net's own CTNormalization: the window's ends become -2 and 2, what lies beyond is clipped."""
    from nnunetv2.preprocessing.normalization.default_normalization_schemes import CTNormalization

    write_dataset(nnunet_env, (40, 40, 40), channels=("CT", "MRI"))
    planner = nnsslPlannerPrimusTiny("Dataset009_Boxes")
    before = planner.make_plans()["foreground_intensity_properties_per_channel"]
    planner.overrides = Overrides(window=(-1000.0, 1000.0))
    plans = planner.make_plans()
    after = plans["foreground_intensity_properties_per_channel"]
    assert after["1"] == before["1"] and after["0"]["min"] == before["0"]["min"]
    assert configuration_of(plans, "3d_fullres")["normalization_schemes"][0] == "CTNormalization"
    assert configuration_of(plans, "3d_fullres")["nnssl"]["reasons"]["window"] == "asked for"
    given = np.array([[[-3000.0, -1000.0, 0.0, 500.0, 1000.0, 3000.0]]], np.float32)
    scaled = CTNormalization(use_mask_for_norm=False, intensityproperties=after["0"]).run(given.copy(), None)
    assert np.allclose(scaled, [-2, -2, 0, 1, 2, 2])
    for window, named in (
        ((1000.0, -1000.0), "1000 to -1000"),
        ((float("nan"), 1.0), "nan to 1"),
        ((0.0, float("inf")), "0 to inf"),
    ):
        planner.overrides = Overrides(window=window)
        with pytest.raises(NnsslError, match=f"^--window {named} HU"):
            planner.make_plans()


def test_fingerprint_is_redone_only_when_images_change(nnunet_env):
    raw = write_dataset(nnunet_env, (16, 16, 16))
    path = nnunet_env.preprocessed / raw.name / FILE
    nnsslPlannerPrimusTiny(9)
    first = path.stat().st_mtime_ns
    nnsslPlannerResEncTiny(9)
    assert path.stat().st_mtime_ns == first
    write(raw / "imagesTr" / "case0_0000.nii.gz", np.random.default_rng(1).normal(50, 5, (16, 16, 20)), (1, 1, 2))
    write(raw / "labelsTr" / "case0.nii.gz", np.ones((16, 16, 20), np.uint8), (1, 1, 2))
    planner = nnsslPlannerPrimusTiny(9)
    assert planner.dataset_fingerprint["spacings"][0] == [1.0, 1.0, 2.0]
    assert planner.dataset_fingerprint["shapes_after_crop"][0] == [16, 16, 20]


def test_labels_do_not_change_the_plans(nnunet_env):
    raw = write_dataset(nnunet_env, (20, 24, 28))
    before = nnsslPlannerPrimusTiny(9).make_plans()
    for case in range(3):
        write(raw / "labelsTr" / f"case{case}.nii.gz", np.ones((20, 24, 28), np.uint8), (1.0, 1.0, 1.0))
    assert nnsslPlannerPrimusTiny(9).make_plans() == before


def test_image_only_data_name_the_command(nnunet_env):
    write_dataset(nnunet_env, (16, 16, 16), labels=False)
    with pytest.raises(NnsslError, match="image-only") as error:
        nnsslPlannerPrimusTiny(9)
    assert "nnssl_convert foreground -d 9" in error.value.fix


def test_some_missing_labels_are_named(nnunet_env):
    raw = write_dataset(nnunet_env, (16, 16, 16))
    (raw / "labelsTr" / "case1.nii.gz").unlink()
    with pytest.raises(NnsslError, match=r"1 of 3 training cases have no label file \(case1\)"):
        nnsslPlannerPrimusTiny(9)


def test_bad_images_are_named(nnunet_env):
    raw = write_dataset(nnunet_env, (16, 16, 16))
    path = raw / "imagesTr" / "case2_0000.nii.gz"
    for content, why in ((0.0, "all voxels are 0"), (5.0, "no label-free foreground")):
        write(path, np.full((16, 16, 16), content), (1.0, 1.0, 1.0))
        with pytest.raises(NnsslError, match=f"case2.*{why}"):
            nnsslPlannerPrimusTiny(9)
    path.write_bytes(b"not an image")
    with pytest.raises(NnsslError, match="case case2: cannot read"):
        nnsslPlannerPrimusTiny(9)
    assert not (nnunet_env.preprocessed / raw.name / FILE).exists()


def test_voxels_that_are_not_finite_are_named(tmp_path):
    class Reader(SimpleITKIO):  # SimpleITK itself reads NaN in NIfTI as 0
        def read_images(self, files):
            return np.full((1, 4, 4, 4), np.nan, np.float32), {"spacing": [1, 1, 1]}

    (tmp_path / "a_0000.nii.gz").touch()
    with pytest.raises(NnsslError, match=r"case a: NaN or infinite voxels in .*a_0000\.nii\.gz"):
        analyse_case("a", [str(tmp_path / "a_0000.nii.gz")], Reader, 10)


def test_unset_folder_is_named(nnunet_env, monkeypatch):
    monkeypatch.delenv("nnUNet_raw")
    with pytest.raises(NnsslError, match="nnUNet_raw is not set"):
        nnsslPlannerPrimusTiny(9)


def test_2d_data_are_refused(nnunet_env):
    write_dataset(nnunet_env, (1, 32, 32))
    with pytest.raises(NnsslError, match="2D"):
        nnsslPlannerPrimusTiny(9).make_plans()


def test_no_fingerprint_names_the_command(nnunet_env):
    raw = write_dataset(nnunet_env, (16, 16, 16))
    (nnunet_env.preprocessed / raw.name / "dataset_fingerprint.json").unlink()
    with pytest.raises(NnsslError, match="Dataset009_Boxes has no fingerprint") as error:
        nnsslPlannerPrimusTiny(9)
    assert error.value.fix == "run: nnUNetv2_extract_fingerprint -d 9"


def test_a_memory_target_below_the_smallest_plan_is_told(nnunet_env):
    write_dataset(nnunet_env, (40, 40, 40))
    for target, told in ((0.5, True), (4.0, False)):
        plans = nnsslPlannerPrimusTiny(9, target).make_plans()
        memory = configuration_of(plans, "3d_fullres")["nnssl"]["memory_gb"]
        shown = describe(plans, "3d_fullres", 2)
        assert (f"needs {memory['estimate']:g} GB, the target is {target:g} GB" in shown) == told
