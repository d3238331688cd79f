"""Evaluation of frozen features on labelled cases, without fine-tuning: voxel heads and their controls."""
