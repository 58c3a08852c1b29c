"""Bundles: a claim on a network's robustness, and its proof by one pass an image."""
