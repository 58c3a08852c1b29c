"""PyTorch's networks in JAX: reading, training and checking them."""
