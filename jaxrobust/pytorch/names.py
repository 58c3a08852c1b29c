"""What this room adds to the registries of the core: name -> "module:OBJECT"."""

# What the core asks for where a network is PyTorch's, see `runtime.pytorch`.
TORCH = {
    # networks and their runs
    "create": "jaxrobust.models.interface.torch_modules:create",
    "origin": "jaxrobust.models.interface.torch_modules:origin",
    "normalises": "jaxrobust.models.interface.torch_modules:normalises",
    "keep": "jaxrobust.models.interface.torch_modules:keep",
    "remember": "jaxrobust.models.interface.torch_modules:remember",
    # weights
    "stored": "jaxrobust.weights.naming.state_dicts:stored",
    "load": "jaxrobust.weights.naming.state_dicts:load",
    "state_dict": "jaxrobust.models.interface.torch_modules:state_dict",
    # `evaluate --torch`
    "built": "jaxrobust.interop.named:built",
    "in_jax": "jaxrobust.interop.named:in_jax",
    "compared_images": "jaxrobust.interop.agreement:FEW",
    # export
    "rebuilt": "jaxrobust.convert.users_module:rebuilt",
    "check_export": "jaxrobust.convert.users_module:check",
    "check_source": "jaxrobust.convert.users_module:check_source",
    "copied": "jaxrobust.convert.users_module:copied",
    "label": "jaxrobust.convert.users_module:label",
    "written": "jaxrobust.convert.users_module:written",
}
