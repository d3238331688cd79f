"""Small scans for the conversion tests: written as files, good and bad."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import SimpleITK as sitk

SHAPE = (10, 12, 14)  # z, y, x voxels


def voxels(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).normal(100, 20, shape).astype(np.float32)


def image(array: np.ndarray, spacing=(0.7, 0.8, 2.5), origin=(-11.5, 20.25, -300.0), angle: float = 0.2) -> sitk.Image:
    """An image with a grid that no axis mix-up survives: three spacings, an origin, a rotation about z."""
    made = sitk.GetImageFromArray(array)
    made.SetSpacing(spacing)
    made.SetOrigin(origin)
    c, s = float(np.cos(angle)), float(np.sin(angle))
    made.SetDirection((c, -s, 0.0, s, c, 0.0, 0.0, 0.0, 1.0))
    return made


def write(path: Path, array: np.ndarray, **grid) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image(array, **grid), str(path), True)
    return path


def label(seed: int = 0, highest: int = 2) -> np.ndarray:
    found = np.zeros(SHAPE, np.uint8)
    found[3:7, 4:8, 5:9] = np.random.default_rng(seed).integers(0, highest + 1, (4, 4, 4))
    found[5, 5, 5] = highest
    return found


def labelled_folder(root: Path, names=("a", "b", "c")) -> tuple[Path, Path]:
    """Folders of images and labels."""
    for seed, name in enumerate(names):
        write(root / "images" / f"{name}.nii.gz", voxels(seed))
        write(root / "labels" / f"{name}.nii.gz", label(seed))
    return root / "images", root / "labels"


def truncate(path: Path, share: float = 0.6) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def repack(path: Path, change) -> None:
    """Change the unpacked bytes of a .nii.gz file."""
    content = bytearray(gzip.decompress(path.read_bytes()))
    change(content)
    path.write_bytes(gzip.compress(bytes(content)))


def dicom_series(
    folder: Path,
    *,
    slices: int = 6,
    spacing: float = 2.5,
    modality: str = "CT",
    series: str = "1.2.3.4.1",
    skip: tuple[int, ...] = (),
    tilt: float = 0.0,
    start: int = 0,
    suffix: str = ".dcm",
) -> np.ndarray:
    """A series of 12x14 slices; returns its Hounsfield units, z going up. `tilt` shifts each slice by so many mm in y."""
    import pydicom
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

    folder.mkdir(parents=True, exist_ok=True)
    stored = np.random.default_rng(start).integers(0, 2000, (slices, 12, 14)).astype(np.uint16)
    for z in range(slices):
        if z in skip:
            continue
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = CTImageStorage
        meta.MediaStorageSOPInstanceUID = f"{series}.{start + z + 1}"
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        slice_ = Dataset()
        slice_.file_meta = meta
        slice_.SOPClassUID, slice_.SOPInstanceUID = CTImageStorage, f"{series}.{start + z + 1}"
        slice_.StudyInstanceUID, slice_.SeriesInstanceUID, slice_.FrameOfReferenceUID = "1.2.3", series, "1.2.3.9"
        slice_.Modality, slice_.PatientID, slice_.SeriesNumber, slice_.InstanceNumber = modality, "p", 1, slices - z
        slice_.ImagePositionPatient = [-40.5, 7 + tilt * z, -100 + spacing * z]
        slice_.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        slice_.PixelSpacing, slice_.SliceThickness = [0.75, 0.5], spacing
        slice_.Rows, slice_.Columns, slice_.SamplesPerPixel = 12, 14, 1
        slice_.BitsAllocated, slice_.BitsStored, slice_.HighBit, slice_.PixelRepresentation = 16, 16, 15, 0
        slice_.PhotometricInterpretation = "MONOCHROME2"
        slice_.RescaleSlope, slice_.RescaleIntercept = 1, -1024
        slice_.PixelData = stored[z].tobytes()
        pydicom.dcmwrite(folder / f"slice{start + slices - z:03d}{suffix}", slice_, enforce_file_format=True)
    return stored.astype(np.int32) - 1024


def decathlon(root: Path, modalities=("MRI",), names=("case_1", "case_2")) -> Path:
    """A Medical Segmentation Decathlon task, channels along the fourth axis."""
    import nibabel

    listing = []
    for seed, name in enumerate(names):
        first = write(root / "labelsTr" / f"{name}.nii.gz", label(seed))
        channels = np.stack([voxels(10 * seed + c) for c in range(len(modalities))], -1)
        data = channels.transpose(2, 1, 0, 3)
        (root / "imagesTr").mkdir(exist_ok=True)
        affine = nibabel.load(first).affine
        nibabel.save(
            nibabel.Nifti1Image(data if len(modalities) > 1 else data[..., 0], affine),
            root / "imagesTr" / f"{name}.nii.gz",
        )
        listing.append({"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"})
    content = {
        "name": "Demo",
        "licence": "CC0",
        "modality": {str(c): m for c, m in enumerate(modalities)},
        "labels": {"0": "background", "1": "one", "2": "two"},
        "numTraining": len(listing),
        "training": listing,
        "test": [],
    }
    (root / "dataset.json").write_text(json.dumps(content))
    return root


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
