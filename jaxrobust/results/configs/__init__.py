"""Configs for the user's own images and network, and a check for all mistakes in a config."""
