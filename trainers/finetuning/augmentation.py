"""Leaving out parts of nnU-Net's training augmentation."""

from __future__ import annotations

from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
from batchgeneratorsv2.transforms.intensity.contrast import ContrastTransform
from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.pseudo2d import Convert2DTo3DTransform, Convert3DTo2DTransform
from batchgeneratorsv2.transforms.utils.random import RandomTransform

_SPATIAL = (SpatialTransform, Convert3DTo2DTransform, Convert2DTo3DTransform)
_INTENSITY = (
    GaussianNoiseTransform,
    GaussianBlurTransform,
    MultiplicativeBrightnessTransform,
    ContrastTransform,
    SimulateLowResolutionTransform,
    GammaTransform,
)


def keep_augmentation(transforms: ComposeTransforms, spatial: bool, intensity: bool) -> ComposeTransforms:
    """`transforms` without nnU-Net's spatial or intensity augmentation; everything that prepares labels stays.

    Without the spatial transform nothing crops any more: patches must be drawn at their final size.
    """

    def kept(transform: BasicTransform) -> bool:
        inner = transform.transform if isinstance(transform, RandomTransform) else transform
        return (spatial or not isinstance(inner, _SPATIAL)) and (intensity or not isinstance(inner, _INTENSITY))

    return ComposeTransforms([t for t in transforms.transforms if kept(t)])
