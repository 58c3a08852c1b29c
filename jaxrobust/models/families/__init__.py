"""The architectures of ImageNet and the robust residual networks, one file each."""
