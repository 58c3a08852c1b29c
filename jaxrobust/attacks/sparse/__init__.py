"""Attacks that change a number of pixels."""
