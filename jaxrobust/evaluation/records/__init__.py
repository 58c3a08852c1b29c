"""Stored results of evaluations: records, verdicts per image, and their comparison."""
