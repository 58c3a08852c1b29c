"""Commands beside the package, run as files from a checkout, and what they share."""
