"""Files and folders: written whole, locked, downloaded; which code wrote them."""
