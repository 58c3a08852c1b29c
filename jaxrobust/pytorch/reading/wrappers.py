"""Removes what surrounds a PyTorch module: wrappers, compiled code, logs and warnings."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any


def inside(module: Any) -> Any:
    """Return the module inside `torch.compile`, data parallelism and averaged weights.

    Raises:
      ValueError: its parameters are sharded, or a wrapper has hooks.
    """
    import torch

    if not isinstance(module, torch.nn.Module):
        return module
    for name, part in module.named_modules():
        kinds = {kind.__name__ for kind in type(part).__mro__}
        if kinds & {"FullyShardedDataParallel", "FSDPModule"}:
            raise ValueError(
                f"{name or 'it'} is wrapped in FSDP, which shards its parameters over "
                "processes; give the unwrapped module, with the weights of its full state dict"
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
    """Run compiled code as plain Python, which `torch.export` can follow."""
    import torch

    with torch.compiler.set_stance("force_eager"):
        yield


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Suppress PyTorch's logs, output and warnings; its exceptions say the same."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
