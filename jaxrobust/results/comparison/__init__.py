"""Evaluations image by image, side by side."""
