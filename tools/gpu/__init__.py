"""Measurements of `bench_gpu.py`, and the file with its figures."""
