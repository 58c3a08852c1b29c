"""Kernels of NVIDIA's libraries, for GPUs."""
