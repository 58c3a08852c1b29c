"""Builds the documentation: what `docs/conf.py` asks for, and the command `build.py`."""
