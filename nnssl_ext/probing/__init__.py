"""Evaluation of frozen features on labelled cases, without fine-tuning: voxel heads, retrieval, and their controls."""
