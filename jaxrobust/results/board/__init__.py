"""Boards: ranked networks, of which every number is of a bundle that verified."""
