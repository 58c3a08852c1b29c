"""Commands on many results: boards of networks, and the list of runs."""
