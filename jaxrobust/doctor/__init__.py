"""Checks a network or a config for common problems: `jaxrobust doctor`."""
