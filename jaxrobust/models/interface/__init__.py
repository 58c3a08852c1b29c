"""What makes a network of an architecture: pure functions, families, names of weights."""
