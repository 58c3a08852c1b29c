"""The weights of a run: its workdir, and what it kept on its way."""
