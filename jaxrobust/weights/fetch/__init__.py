"""Sources of weights, parsed and fetched: files, addresses, hubs."""
