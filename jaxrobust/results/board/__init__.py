"""Boards: ranked networks, with every number from a verified bundle."""
