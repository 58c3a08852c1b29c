"""Boards: networks beside each other, of which every number is of a bundle that verified."""
