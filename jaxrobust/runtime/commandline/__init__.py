"""Command lines: flags, mistakes as one sentence, functions by name, exit codes."""
