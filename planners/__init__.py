"""Experiment planners, label-free fingerprint and preprocessing for stock nnU-Net commands."""
