"""Figures and tables of records, for papers."""
