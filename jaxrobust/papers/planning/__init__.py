"""Which runs a paper's tables need, in which order, at which cost."""
