"""The weights of a run: its workdir, and what it kept along the way."""
