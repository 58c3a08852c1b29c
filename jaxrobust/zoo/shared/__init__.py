"""Shared parts of the study's networks."""
