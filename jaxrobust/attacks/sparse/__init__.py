"""Attacks that change a limited number of pixels."""
