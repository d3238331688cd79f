"""Chest phantoms: what is written is what was drawn; lungs and lesions are where physics says, and crops follow the lungs."""

import json

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

from nnssl_ext.data.foreground import foreground_mask, lung_mask
from nnssl_ext.dataset_conversion.lesion_phantoms import (
    LesionPhantomSettings,
    generate_lesion_phantom,
    write_lesion_task,
)
from nnssl_ext.errors import NnsslError

SETTINGS = LesionPhantomSettings()


@pytest.mark.parametrize("seed", range(6))
def test_lesions_can_be_counted_and_look_like_soft_tissue_in_air(seed):
    phantom = generate_lesion_phantom(SETTINGS, seed)
    labels, count = ndimage.label(phantom.labels, np.ones((3, 3, 3)))
    assert count == phantom.lesions
    for number in range(1, count + 1):
        lesion = labels == number
        diameter = 2 * (3 * lesion.sum() * np.prod(phantom.spacing) / (4 * np.pi)) ** (1 / 3)
        assert 3 < diameter < 13  # mm, of radii 2.5 to 6, flattened by up to a fifth
    inner = ndimage.binary_erosion(phantom.labels > 0)
    if inner.any():
        assert abs(float(phantom.image[inner].mean()) - 35) < 30
    again = generate_lesion_phantom(SETTINGS, seed)
    assert np.array_equal(again.image, phantom.image) and np.array_equal(again.labels, phantom.labels)


def test_some_cases_are_healthy_and_cases_differ():
    counts = [generate_lesion_phantom(SETTINGS, seed).lesions for seed in range(12)]
    assert min(counts) == 0 and max(counts) >= 3


def test_the_lung_mask_finds_both_lungs_and_no_air_outside():
    """Against the volume of two ellipsoids, 4/3 pi abc each; vessels and lesions take a little off."""
    settings = LesionPhantomSettings(lesions=(0, 0), vessels=0)
    phantom = generate_lesion_phantom(settings, 3)
    lungs = lung_mask(phantom.image)
    size = np.random.default_rng([3, 1]).uniform(0.9, 1.1)
    expected = 2 * 4 / 3 * np.pi * 34 * 23 * 14 * size**3
    assert lungs.sum() * np.prod(phantom.spacing) == pytest.approx(expected, rel=0.1)
    assert ndimage.label(lungs)[1] == 2 and not (lungs & ~foreground_mask(phantom.image)).any()
    assert phantom.image[lungs].max() < -300 and not lungs[0].any()


def test_without_lungs_it_says_so():
    image = np.full((20, 20, 20), -1000, np.int16)
    image[5:15, 5:15, 5:15] = 40
    with pytest.raises(NnsslError, match="no lungs"):
        lung_mask(image)


def test_the_task_folder(tmp_path, nnunet_env):
    write_lesion_task(tmp_path / "Task900_LesionPhantoms", SETTINGS, 3)
    listed = json.loads((tmp_path / "Task900_LesionPhantoms" / "dataset.json").read_text())
    assert listed["modality"] == {"0": "CT"} and len(listed["training"]) == 3
    phantom = generate_lesion_phantom(SETTINGS, 2)
    image = sitk.ReadImage(str(tmp_path / "Task900_LesionPhantoms" / "imagesTr" / "chest_002.nii.gz"))
    assert np.array_equal(sitk.GetArrayFromImage(image), phantom.image)
    assert image.GetSpacing()[::-1] == pytest.approx(phantom.spacing)
    with pytest.raises(NnsslError, match="exists already"):
        write_lesion_task(tmp_path / "Task900_LesionPhantoms", SETTINGS, 1)

    nnunet_env.run("nnssl_convert", "msd", tmp_path / "Task900_LesionPhantoms", "-d", 900, "-np", 1)
    size = ("--size", 16, 16, 16, "--count", 2, "--around", "lungs", "--min-foreground", 0.3)
    nnunet_env.run("nnssl_convert", "patches", "-d", 900, "-o", 901, *size, "-np", 1)
    (patches,) = nnunet_env.raw.glob("Dataset901_*")
    for entry in json.loads((patches / "patches.json").read_text())["patches"].values():
        assert entry["foreground_share"] >= 0.3
    means = [sitk.GetArrayFromImage(sitk.ReadImage(str(p))).mean() for p in (patches / "imagesTr").iterdir()]
    assert len(means) == 6 and max(means) < -150  # a third of each crop is lung, at least
