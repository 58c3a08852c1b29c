"""Builds the documentation: code for `docs/conf.py`, and the command `build.py`."""
