"""The study's convolutional networks in PyTorch, one file each."""
