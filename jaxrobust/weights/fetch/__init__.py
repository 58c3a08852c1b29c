"""Where weights come from: files, addresses, hubs."""
