"""The geometry of the norms: balls, hyperplanes, windows, rules of L1."""
