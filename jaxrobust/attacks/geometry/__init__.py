"""Geometry of the norms: balls, hyperplanes, windows, L1 rules."""
