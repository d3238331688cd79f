"""Losses as plain functions over tensors."""
