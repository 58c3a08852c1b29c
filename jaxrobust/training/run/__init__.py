"""A run: its phases, its steps, what it selects, and how it stops and continues."""
