"""Names of weights: a reference's become ours and back, heads and stems are newly initialised."""
