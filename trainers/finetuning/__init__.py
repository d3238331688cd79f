"""Trainers that stock nnUNetv2_train finds."""
