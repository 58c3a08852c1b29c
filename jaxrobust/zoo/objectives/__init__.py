"""Objectives and attacks of several norms that a config names."""
