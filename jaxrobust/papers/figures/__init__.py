"""Figures and tables of records, as a paper shows them."""
