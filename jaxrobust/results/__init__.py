"""Looking at networks and numbers: analyses, comparisons, the papers' tables."""
