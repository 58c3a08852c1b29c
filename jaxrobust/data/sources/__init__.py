"""The kinds of data sets, one file each, and the registry that opens them by name."""
