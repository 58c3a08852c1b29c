"""PyTorch's networks in JAX.

`torch` takes modules: `reading` writes them down as a `program` of `operators`, and `agreement`
compares both sides before anything is believed. `networks` trains them.
"""
