"""Stages after a training in one command: choice of weights, attacks on them, their export."""
