"""Boxes, affines and correspondence of two views; NumPy and torch functions, no modules."""
