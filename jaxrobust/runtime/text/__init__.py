"""What a person reads: text as wide as a terminal, spelling, progress, waiting."""
