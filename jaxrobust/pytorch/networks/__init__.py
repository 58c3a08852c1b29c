"""PyTorch modules as trainable networks, and the patterns in them that our kernels compute."""
