"""Objectives, and attacks for several norms, that configs can name."""
