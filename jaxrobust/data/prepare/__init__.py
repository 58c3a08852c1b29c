"""Converts published data sets to ArrayRecord as TFDS reads it; no TensorFlow needed."""
