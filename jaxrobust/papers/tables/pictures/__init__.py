"""Pictures of the papers' tables, with our values."""
