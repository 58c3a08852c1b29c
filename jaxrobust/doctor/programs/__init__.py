"""Compiled programs, read from XLA's text: instructions, costs, parts, topologies."""
