"""Experiment planners for stock nnU-Net commands, label-free fingerprint, normalisation, memory model."""
