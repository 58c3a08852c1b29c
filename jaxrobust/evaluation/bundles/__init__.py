"""Bundles: a claim about a network's robustness, provable with one pass per image."""
