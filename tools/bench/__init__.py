"""Shared parts of benchmarks: networks in both frameworks, a PyTorch step, programs for TPUs."""
