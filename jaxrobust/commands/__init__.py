"""The commands, one file each: `jaxrobust COMMAND ...`."""
