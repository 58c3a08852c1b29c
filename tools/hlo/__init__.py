"""Where the time of a compiled program goes, read from the text of its optimised HLO module."""
