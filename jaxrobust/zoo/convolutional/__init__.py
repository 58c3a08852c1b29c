"""The study's convolutional networks, one file each.

By their parameters those for 32 px are kuangliu/pytorch-cifar's (49b7aa9), but for the wide one. Of
224 px the paper does not say what it takes: ours are the standard networks, under the same names.
"""
