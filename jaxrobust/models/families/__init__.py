"""The ImageNet architectures and the robust residual networks, one file each.

Parity: tests/models/families compares each with golden logits of the code that its file names, and
of timm 1.0.9 where available.
"""
