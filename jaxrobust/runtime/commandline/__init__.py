"""Command lines: flags, one-sentence errors, functions by name, exit codes."""
