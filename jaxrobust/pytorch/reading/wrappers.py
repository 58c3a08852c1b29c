"""What PyTorch puts around a module: the module inside is taken, and compiled code runs as it is
written."""

import contextlib
from collections.abc import Iterator
from typing import Any

_SHARDED = {"FullyShardedDataParallel", "FSDPModule"}


def inside(module: Any) -> Any:
    """Return the module inside of `torch.compile`, data parallelism and averages of weights.

    Raises:
      ValueError: its parameters are divided over processes, or a wrapper has hooks.
    """
    import torch

    if not isinstance(module, torch.nn.Module):
        return module
    for name, part in module.named_modules():
        if _SHARDED & {kind.__name__ for kind in type(part).__mro__}:
            raise ValueError(
                f"{name or 'it'} is wrapped by FSDP, and its parameters are divided over "
                "processes; give the module without it, with the weights of its full state dict"
            )
    parallel = torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel
    while True:
        if "_orig_mod" in module._modules:  # of torch.compile
            inner = module._orig_mod
        elif isinstance(module, (*parallel, torch.optim.swa_utils.AveragedModel)):
            inner = module.module
        else:
            return module
        if module._forward_hooks or module._forward_pre_hooks:
            raise ValueError(
                f"the {type(module).__name__} around it has hooks; register them on the module "
                "inside"
            )
        module = inner


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Let all that `torch.compile` has compiled run as Python, which `torch.export` can follow."""
    import torch

    with torch.compiler.set_stance("force_eager"):
        yield
