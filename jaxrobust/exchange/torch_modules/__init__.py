"""Self-contained PyTorch files, one for each architecture, which exports copy."""
