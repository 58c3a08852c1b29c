"""How long XLA works on a program of the tests, most of which run for a moment only."""

import os

import jax

# Few of LLVM's optimisations, and XLA's older way to write loops: half the time.
_QUICK = {"xla_backend_optimization_level": 1, "xla_cpu_use_fusion_emitters": False}
_AS_USERS = {
    "xla_backend_optimization_level": 3,
    "xla_cpu_use_fusion_emitters": True,
    "xla_llvm_disable_expensive_passes": False,
}
_SINCE, _UNTIL = (0, 7), (0, 11)  # XLA stops at a flag that it does not know
_KNOWN = _SINCE <= jax.__version_info__ < _UNTIL
FLAGS = "".join(f" --{k}={str(v).lower()}" for k, v in _QUICK.items()) if _KNOWN else ""


def quickly() -> None:
    """Compile quickly from now on; to be called before JAX starts."""
    os.environ["XLA_FLAGS"] += FLAGS


def _is_quick() -> bool:
    return bool(FLAGS) and os.environ["XLA_FLAGS"].endswith(FLAGS)


def for_test(*, computes: bool) -> None:
    """Do without the rest of the optimisations in a test that runs shorter than it compiles."""
    jax.config.update("jax_disable_most_optimizations", _is_quick() and not computes)


def as_users() -> dict[str, int | bool]:
    """Return `compiler_options` for what is compared to the last unit of a float."""
    return _AS_USERS if _is_quick() else {}
