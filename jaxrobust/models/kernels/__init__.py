"""Layers as functions, each with the implementation that is fast where it runs."""
