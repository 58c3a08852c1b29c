"""The network under evaluation: its programs, its fingerprint, and whether to believe it."""
