"""Preprocessed cases as nnU-Net saves them, for tests."""

from pathlib import Path

import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2


def coordinate_volume(shape: tuple[int, int, int]) -> np.ndarray:
    """Three channels that hold each voxel's own z, y and x."""
    return np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij")).astype(np.float32)


def save_case(folder: Path, name: str, image: np.ndarray, patch: tuple[int, int, int] = (32, 32, 32)) -> None:
    """Write ``(C, Z, Y, X)`` with nnU-Net's own function, chunked for this patch size."""
    folder.mkdir(parents=True, exist_ok=True)
    blocks, chunks = comp_blosc2_params(image.shape, patch)
    labels = np.zeros((1, *image.shape[1:]), np.int8)
    nnUNetDatasetBlosc2.save_case(image, labels, {"spacing": (1, 1, 1)}, str(folder / name), chunks, blocks)
