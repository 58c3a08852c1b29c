"""Tests whether a network, or a config, has one of the usual faults: `jaxrobust doctor`."""
