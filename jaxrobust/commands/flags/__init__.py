"""Flags that several commands have, and those of `jaxrobust evaluate`."""
