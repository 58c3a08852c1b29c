"""PyTorch's side of each architecture: what an exported file is made of."""
