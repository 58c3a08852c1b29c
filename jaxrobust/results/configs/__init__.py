"""A config for somebody's own images and network, and all that is wrong with a config at once."""
