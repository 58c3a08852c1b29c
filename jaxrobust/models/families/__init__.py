"""The architectures of ImageNet and the robust residual networks, one file each.

Parity: tests/models/families, of each against golden logits of the code that its file names, and
of timm 1.0.9 where that has it.
"""
