"""The parts of the page, one file each, and the sentences in them."""
