"""The fast version: verdicts near the standard version's, at a fifth of its passes."""
