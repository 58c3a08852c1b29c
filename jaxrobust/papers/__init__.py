"""The papers' tables, plans and pictures."""
