"""A run: its phases and steps, model selection, and how it stops and resumes."""
