"""Sources of weights, parsed and brought here: files, addresses, hubs."""
