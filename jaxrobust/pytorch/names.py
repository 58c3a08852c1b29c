"""Additions to the registries of the core: name -> "module:OBJECT"."""

# What the core needs if a network is a PyTorch module, see `runtime.pytorch`.
TORCH = {
    # networks and their runs
    "create": "jaxrobust.pytorch.networks.torch_modules:create",
    "origin": "jaxrobust.pytorch.networks.torch_modules:origin",
    "normalises": "jaxrobust.pytorch.networks.torch_modules:normalises",
    "keep": "jaxrobust.pytorch.networks.torch_modules:keep",
    "remember": "jaxrobust.pytorch.networks.torch_modules:remember",
    # weights
    "stored": "jaxrobust.pytorch.state_dicts:stored",
    "load": "jaxrobust.pytorch.state_dicts:load",
    "state_dict": "jaxrobust.pytorch.networks.torch_modules:state_dict",
    # `evaluate --torch`
    "built": "jaxrobust.pytorch.named:built",
    "in_jax": "jaxrobust.pytorch.named:in_jax",
    "compared_images": "jaxrobust.pytorch.agreement:FEW",
    # export
    "rebuilt": "jaxrobust.pytorch.users_module:rebuilt",
    "check_export": "jaxrobust.pytorch.users_module:check",
    "check_source": "jaxrobust.pytorch.users_module:check_source",
    "copied": "jaxrobust.pytorch.users_module:copied",
    "label": "jaxrobust.pytorch.users_module:label",
    "written": "jaxrobust.pytorch.users_module:written",
}
