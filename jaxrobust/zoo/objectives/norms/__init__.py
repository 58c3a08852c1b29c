"""Steps that combine several norms: ascent from a common point, or a common loss."""
