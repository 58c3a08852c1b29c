"""Commands of the papers: tables, plans, pictures."""
