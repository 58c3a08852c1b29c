"""Devices: meshes, peaks, compiled programs and what they cost, traces."""
