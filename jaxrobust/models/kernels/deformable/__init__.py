"""Deformable convolutions: `operator.deformable`, and its formulas by platform."""
