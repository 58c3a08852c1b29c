"""Data sets from what their authors publish to ArrayRecord, as TFDS reads it; no TensorFlow."""
