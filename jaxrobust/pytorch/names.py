"""What this room adds to the registries of the core: name -> "module:OBJECT"."""
