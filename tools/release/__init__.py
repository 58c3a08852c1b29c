"""Makes what a release uploads: `make.py`."""
