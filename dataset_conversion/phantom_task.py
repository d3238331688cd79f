"""Phantoms as a task folder in the layout of the Medical Segmentation Decathlon, with their warps beside them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import SimpleITK as sitk
from tqdm import tqdm

from nnssl_ext.dataset_conversion.phantoms import Phantom, PhantomSettings, generate_phantom, labels_of
from nnssl_ext.dataset_conversion.whole_folder import whole_folder
from nnssl_ext.errors import NnsslError
from nnssl_ext.files import write_json


def write_phantom_task(folder: Path, settings: PhantomSettings, count: int, first_seed: int = 0) -> None:
    """Write subjects ``phantom_000`` ... as ``imagesTr``, ``labelsTr`` and ``displacementsTr``, with ``dataset.json``.

    ``displacementsTr/phantom_000.mha`` is an ITK displacement field in mm, subject point -> template point: resampling
    the template onto the subject's grid with it gives the subject.

    Args:
        folder: must not exist; appears whole or not at all.
        settings: how the phantoms look.
        count: number of subjects; subject ``i`` has the seed ``first_seed + i``.

    Raises:
        NnsslError: impossible settings, or the folder exists or cannot be written.
    """
    if folder.exists():
        raise NnsslError(f"{folder} exists already", "remove it, or choose another folder")
    names = [f"phantom_{i:03d}" for i in range(count)]
    with whole_folder(folder) as building:
        for part in ("imagesTr", "labelsTr", "displacementsTr"):
            (building / part).mkdir()
        for seed, name in enumerate(tqdm(names, desc="phantoms", unit="case", disable=None), start=first_seed):
            phantom = generate_phantom(settings, seed)
            voxels = phantom.image.astype(np.int16) if settings.modality == "ct" else phantom.image
            sitk.WriteImage(to_itk(voxels, phantom), building / "imagesTr" / f"{name}.nii.gz")
            sitk.WriteImage(to_itk(phantom.labels, phantom), building / "labelsTr" / f"{name}.nii.gz")
            field = np.moveaxis(phantom.displacement[::-1], 0, -1)  # ITK: components x, y, z
            sitk.WriteImage(to_itk(field, phantom), building / "displacementsTr" / f"{name}.mha", useCompression=True)
        write_json(building / "dataset.json", _description(settings, names))


def to_itk(array: np.ndarray, phantom: Phantom) -> sitk.Image:
    """``(Z, Y, X)``, or ``(Z, Y, X, 3)`` vectors, as an image on the phantom's grid; its middle is the physical origin."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(array), isVector=array.ndim == 4)
    spacing = phantom.spacing[::-1]
    image.SetSpacing(spacing)
    image.SetOrigin([-(n - 1) / 2 * s for n, s in zip(image.GetSize(), spacing, strict=True)])
    return image


def _description(settings: PhantomSettings, names: list[str]) -> dict[str, object]:
    return {
        "name": "Phantoms",
        "description": "synthetic subjects, each a template anatomy under a known smooth warp",
        "reference": "nnssl_ext.dataset_conversion.phantoms",
        "licence": "Apache-2.0",
        "tensorImageSize": "3D",
        "modality": {"0": {"mr": "MRI", "ct": "CT"}[settings.modality]},
        "labels": {str(value): name for name, value in labels_of(settings).items()},
        "numTraining": len(names),
        "numTest": 0,
        "training": [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in names],
        "test": [],
    }
