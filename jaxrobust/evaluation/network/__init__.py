"""The network under evaluation: its programs, its fingerprint, and checks of its reliability."""
