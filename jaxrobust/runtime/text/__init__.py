"""User-facing text: terminal width, spelling, progress, waiting."""
