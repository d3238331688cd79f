"""Curves, pictures and HTML pages."""
