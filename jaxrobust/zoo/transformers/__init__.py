"""The study's transformers and hybrids, one file each."""
