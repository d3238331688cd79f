"""Crop policies, masks, and the batched resampling and augmentation that turn regions into views."""
