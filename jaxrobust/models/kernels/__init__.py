"""Layers as functions, each with an implementation that is fast on its platform."""
