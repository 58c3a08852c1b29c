"""Where the time of a compiled program goes, from the text of its optimized HLO module."""
