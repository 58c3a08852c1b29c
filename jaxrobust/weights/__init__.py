"""Weights, from what the user names to a network of ours.

fetch/sources.py    a `WeightSource`: a file, folder, run, address or name, fetched to this machine
reading.py          turns it into an `Artifact`: named arrays and `WeightFacts`; one reader per kind
naming/networks.py  turns that into a `Network`: complete arrays under our names
imports.py          cache folders that hold networks of others
load.py, start.py   `jaxrobust.load`, and the weights that a run starts from
store/, trained/    files, folders, checkpoints, certificates; the weights in a run's workdir
"""
