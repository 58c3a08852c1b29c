"""The runs that a paper's tables need, with order and cost."""
