"""Import, export and certificates: weights from timm and from RobustBench's files, and back."""
