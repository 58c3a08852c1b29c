"""Analyses of networks and results: comparisons, boards, the choice of weights."""
