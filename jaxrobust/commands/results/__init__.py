"""Commands that look at many results: figures of records, and the list of runs."""
