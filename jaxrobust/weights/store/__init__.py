"""Weights on disk: checkpoints, files, folders, their hashes and certificates."""
