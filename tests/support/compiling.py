"""How long XLA works on a program of the fast tests, which run for a moment only."""

import os

import jax

# Few of LLVM's optimisations, and XLA's older way to write loops: half the time.
_QUICK = {"xla_backend_optimization_level": 1, "xla_cpu_use_fusion_emitters": False}
_AS_USERS = {"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True}
_FLAGS = "".join(f" --{name}={str(value).lower()}" for name, value in _QUICK.items())
_SINCE, _UNTIL = (0, 7), (0, 11)  # XLA stops at a flag that it does not know


def quickly() -> None:
    """Compile quickly from now on; to be called before JAX starts."""
    if _SINCE <= jax.__version_info__ < _UNTIL:
        os.environ["XLA_FLAGS"] += _FLAGS


def as_users() -> dict[str, int | bool]:
    """Return `compiler_options` for what is compared to the last unit of a float."""
    return _AS_USERS if os.environ["XLA_FLAGS"].endswith(_FLAGS) else {}
