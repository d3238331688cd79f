"""A whole abdominal CT and a copy of it as MR might show it, deformed by a known smooth warp."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from jaxtyping import Bool, Float
from scipy.ndimage import map_coordinates

from nnssl_ext.data.foreground import foreground_mask
from nnssl_ext.registration.images import grid_of
from nnssl_ext.views.corruptions import bias_field
from nnssl_ext.views.warps import smooth_displacement

CONTROL = 20.0  # voxels of 3 mm: 60 mm between control points
# HU and what a T1-weighted image might make of it: fat bright, organs between, water and bone dark, air black. Not monotone.
TONES = (
    (-1024, -300, -130, -70, 0, 40, 80, 160, 300, 1500),
    (0.0, 0.0, 0.9, 0.9, 0.15, 0.4, 0.55, 0.5, 0.2, 0.05),
)
BIAS, NOISE = 0.4, 0.03


@dataclass(frozen=True)
class Abdomen:
    """Files of a pair, and where every voxel of the fixed scan lies in the moving one.

    Attributes:
        fixed: the MR-like copy; it shows at ``x`` what the CT shows at ``x + truth(x)``.
        moving: the CT.
        truth: world order, mm.
        body: voxels of the fixed scan that show the body, and whose partner the CT shows.
    """

    fixed: Path
    moving: Path
    truth: Float[np.ndarray, "Z Y X 3"]
    body: Bool[np.ndarray, "Z Y X"]

    def error(self, displacement: Path) -> Float[np.ndarray, " N"]:
        """Target registration error of a field in mm, at every voxel of the body."""
        found = sitk.GetArrayFromImage(sitk.ReadImage(str(displacement)))
        return np.linalg.norm(found - self.truth, axis=-1)[self.body]


def mr_like(hounsfield: Float[np.ndarray, "Z Y X"], seed: int = 0) -> Float[np.ndarray, "Z Y X"]:
    """Another contrast, a coil's bias field, Rician noise."""
    tones = torch.from_numpy(np.interp(hounsfield, *TONES).astype(np.float32))
    signal = bias_field(tones[None, None], torch.tensor([BIAS]), [seed])[0, 0].numpy()
    real, imaginary = NOISE * np.random.default_rng(seed).normal(size=(2, *signal.shape))
    return (1000 * np.hypot(signal + real, imaginary)).astype(np.float32)


def write_abdomen(data: Path, folder: Path, seed: int = 1) -> Abdomen:
    """Warp and re-contrast the example CT at full resolution."""
    moving = data / "ct_mr_examples" / "example_ct.nii.gz"
    image = sitk.ReadImage(str(moving), sitk.sitkFloat32)
    ct, grid = sitk.GetArrayFromImage(image), grid_of(image)
    voxels = smooth_displacement(grid.size, [CONTROL] * 3, 1.0, seed).numpy()
    places = np.stack(np.meshgrid(*map(np.arange, grid.size), indexing="ij")) + voxels
    warped = map_coordinates(ct, places, order=3, mode="nearest")
    last = np.reshape(grid.size, (3, 1, 1, 1)) - 1
    body = foreground_mask(warped) & ((places >= 0) & (places <= last)).all(axis=0)
    fixed = folder / "mr_like.nii.gz"
    sitk.WriteImage(grid.image(mr_like(warped, seed)), str(fixed))
    return Abdomen(fixed, moving, grid.to_world(voxels), body)
