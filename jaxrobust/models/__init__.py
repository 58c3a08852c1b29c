"""Networks: `available()` lists them, `create(name)` makes one."""
