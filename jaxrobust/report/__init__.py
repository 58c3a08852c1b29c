"""Runs and evaluations as one HTML file: data -> figures -> page; see `README.md`."""
