"""Pretraining methods and the fine-tuning trainer."""
