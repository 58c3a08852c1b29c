"""Weights between PyTorch and us: import, export, and certificates of a conversion."""
