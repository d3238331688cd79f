"""Losses over tensors, and the targets that a teacher gives."""
