"""Networks of other frameworks as functions of images in JAX.

`torch` takes PyTorch's modules: `exporting` writes them down as a `program` of `operators`, and
`agreement` compares both sides before anything is believed.
"""
