"""Devices: meshes, peak performance, compiled programs and their cost, traces."""
