"""Kernels from NVIDIA's libraries, for GPUs."""
