"""Backbones behind one contract, and the segmentation networks that nnU-Net builds from the plans."""
