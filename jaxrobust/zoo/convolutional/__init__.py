"""The study's convolutional networks, one file each.

By parameter counts, the networks for 32 px are from kuangliu/pytorch-cifar (49b7aa9), except the
wide one. The paper does not name its networks for 224 px; ours are the standard ones.
"""
