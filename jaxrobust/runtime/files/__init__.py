"""Files and folders: atomic writes, locks, downloads, and which code wrote them."""
