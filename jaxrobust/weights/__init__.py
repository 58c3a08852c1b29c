"""Weights of networks, from what a user names to a network of ours.

fetch/sources.py    a `WeightSource`: a file, folder, run, address or name, brought here
reading.py          an `Artifact` of it: arrays by name, and `WeightFacts`; one reader for each kind
naming/networks.py  a `Network` of that: arrays under our names, complete for its sizes
imports.py          folders of the cache that keep networks of others
load.py, start.py   `jaxrobust.load`, and the weights that a run starts from
store/, trained/    files, folders, checkpoints, certificates; the weights in a run's workdir
"""
