"""What comes before JAX's first computation: allocator and cores on CPU, the hosts of a pod."""

import os
import platform
import sys

# glibc returns buffers above 128 KiB to the system after every use, so each step pays their page
# faults again: a quarter of a ConvNeXt step on CPU. These keep them, on huge pages.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "2000000000",
    "MALLOC_TRIM_THRESHOLD_": "4000000000",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


def keep_large_buffers() -> None:
    """Starts this very command again with `ALLOCATOR` in its environment.

    glibc reads them once, when the process starts. Nothing happens where any of them is set,
    elsewhere than under glibc, or with `JAXROBUST_ALLOCATOR=system`.
    """
    if (
        platform.libc_ver()[0] != "glibc"
        or os.environ.get("JAXROBUST_ALLOCATOR") == "system"
        or any(name in os.environ for name in ALLOCATOR)
    ):
        return
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | ALLOCATOR)


def use_every_core() -> None:
    """Makes JAX see one CPU device for each core that this process may use.

    JAX reads the variable when it starts. Nothing happens where the environment says a number.
    """
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        affinity = getattr(os, "sched_getaffinity", None)  # Linux
        cores = len(affinity(0)) if affinity else os.cpu_count() or 1
        os.environ.setdefault("JAX_NUM_CPU_DEVICES", str(cores))


def join_hosts() -> None:
    """Connects the processes of a pod; JAX finds out about Cloud TPU, Slurm and the like itself.

    Elsewhere JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID
    say who takes part.
    Raises:
      ValueError: neither a cluster nor those variables are there.
    """
    import jax

    count, index = (os.environ.get(f"JAX_{n}") for n in ("NUM_PROCESSES", "PROCESS_ID"))
    try:
        jax.distributed.initialize(
            num_processes=int(count) if count else None, process_id=int(index) if index else None
        )
    except ValueError as error:
        raise ValueError(
            "--multihost found no cluster; set JAX_COORDINATOR_ADDRESS=host:port, "
            f"JAX_NUM_PROCESSES and JAX_PROCESS_ID on each host ({error})"
        ) from error
