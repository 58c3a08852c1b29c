"""PyTorch networks in JAX.

`torch` converts modules: `reading` turns them into a `program` of `operators`, and `agreement`
compares both sides before any result is used. `networks` trains them.
"""
