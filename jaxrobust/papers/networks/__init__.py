"""Analyses from Debenedetti's thesis beyond accuracies, for any network.

Each analysis is one file: numbers as rows of a CSV, and a picture of them.
"""
