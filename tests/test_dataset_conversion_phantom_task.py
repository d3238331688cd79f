"""The phantom task folder, read back with ITK alone."""

import json

import numpy as np
import pytest
import SimpleITK as sitk

from nnssl_ext.dataset_conversion.phantom_task import to_itk, write_phantom_task
from nnssl_ext.dataset_conversion.phantoms import LABELS, PhantomSettings, generate_phantom
from nnssl_ext.errors import NnsslError


def test_layout_and_contents(tmp_path):
    write_phantom_task(tmp_path / "task", PhantomSettings(modality="ct"), 2, first_seed=7)
    description = json.loads((tmp_path / "task" / "dataset.json").read_text())
    assert description["numTraining"] == len(description["training"]) == 2
    assert description["labels"] == {str(v): k for k, v in LABELS.items()} and description["modality"] == {"0": "CT"}
    for seed, entry in enumerate(description["training"], start=7):
        phantom = generate_phantom(PhantomSettings(modality="ct"), seed)
        image, labels = (sitk.ReadImage(tmp_path / "task" / entry[kind]) for kind in ("image", "label"))
        assert np.array_equal(sitk.GetArrayFromImage(image), phantom.image)
        assert np.array_equal(sitk.GetArrayFromImage(labels), phantom.labels)
        assert np.allclose(image.GetSpacing()[::-1], phantom.spacing)
        middle = image.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in image.GetSize()])
        assert np.allclose(middle, 0, atol=1e-4)


def test_itk_warps_the_template_onto_the_subject(tmp_path):
    write_phantom_task(tmp_path / "task", PhantomSettings(), 1, first_seed=11)
    wide = {"field_of_view": (88.0, 100.0, 92.0), "spacing": (1.0, 1.0, 1.0), "spacing_jitter": 0.0}
    template = generate_phantom(PhantomSettings(deformation=0.0, **wide), 0)
    subject = sitk.ReadImage(tmp_path / "task" / "labelsTr" / "phantom_000.nii.gz")
    field = sitk.ReadImage(tmp_path / "task" / "displacementsTr" / "phantom_000.mha", sitk.sitkVectorFloat64)
    warp = sitk.DisplacementFieldTransform(field)
    warped = sitk.Resample(to_itk(template.labels, template), subject, warp, sitk.sitkNearestNeighbor)
    overlap = sitk.LabelOverlapMeasuresImageFilter()
    overlap.Execute(warped, subject)
    for name, value in LABELS.items():
        assert overlap.GetDiceCoefficient(value) > 0.93, name


def test_an_existing_folder_is_left_alone(tmp_path):
    (tmp_path / "task").mkdir()
    with pytest.raises(NnsslError, match="task"):
        write_phantom_task(tmp_path / "task", PhantomSettings(), 1)
    assert list(tmp_path.rglob("*")) == [tmp_path / "task"]
