"""Deformable convolutions: `operator.deformable`, and its implementations by platform."""
