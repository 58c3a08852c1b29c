"""How long XLA works on a program of the tests, most of which run for a moment only."""

import os

import jax

# Few of LLVM's optimizations, and XLA's older way to write loops: half the time. A program in one
# part, not in up to 32 that are compiled by as many threads: another quarter. Each with its value
# for users and the first JAX that is not known to have it: XLA aborts at unknown flags.
_QUICK = {
    "xla_backend_optimization_level": (1, 3, (0, 13)),
    "xla_cpu_use_fusion_emitters": (False, True, (0, 11)),
    "xla_cpu_parallel_codegen_split_count": (1, 32, (0, 11)),
}
_HERE = {k: values for k, (*values, until) in _QUICK.items() if jax.__version_info__ < until}
_AS_USERS = {name: value for name, (_, value) in _HERE.items()}
_AS_USERS |= {"xla_llvm_disable_expensive_passes": False}
FLAGS = "".join(f" --{name}={str(value).lower()}" for name, (value, _) in _HERE.items())


def quickly() -> None:
    """Compile quickly from now on; to be called before JAX starts."""
    os.environ["XLA_FLAGS"] += FLAGS


def _is_quick() -> bool:
    return bool(FLAGS) and os.environ["XLA_FLAGS"].endswith(FLAGS)


def for_test(*, computes: bool) -> None:
    """Do without the rest of the optimizations in a test that runs shorter than it compiles."""
    jax.config.update("jax_disable_most_optimizations", _is_quick() and not computes)


def as_users() -> dict[str, int | bool]:
    """Return `compiler_options` for what is compared to the last unit of a float."""
    return _AS_USERS if _is_quick() else {}
