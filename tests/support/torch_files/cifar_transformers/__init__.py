"""The study's transformers and hybrids in PyTorch, one file each."""
