"""PyTorch modules as networks that train: which kernels of ours take which of their patterns."""
