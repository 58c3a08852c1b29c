"""Runs and evaluations as one HTML file: data -> figures -> page; see `jaxrobust report`.

`gathered` reads what is on disk into plain data (with `curves` for metrics), `sentences` says it in
words, `figures` and `matrix` draw it as SVG, the `*_part` modules put figures and tables together,
and `page` makes the file, with `markup` and `appearance`; `watching` serves it while a run goes on,
and `pictures` gives the figures of a phase one by one, for TensorBoard and Weights & Biases.
"""
