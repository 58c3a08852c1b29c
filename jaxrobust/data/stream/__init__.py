"""From records to batches: the order of training, loading, and arrays of a split."""
