"""Adversarially robust image classifiers in JAX."""
