"""Commands that look at a network: analyses, its loss landscape, its sparsity."""
