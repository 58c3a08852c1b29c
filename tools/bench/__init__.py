"""What benchmarks share: networks in both frameworks, a step of PyTorch, programs for TPUs."""
