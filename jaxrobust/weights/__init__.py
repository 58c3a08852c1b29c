"""Weights of networks: read, converted, fetched, started from, kept, handed on."""
