"""Setup before JAX's first computation: allocator and CPU cores, the hosts of a pod."""

import importlib.util
import os
import pkgutil
import platform
import socket
import sys
import threading
from pathlib import Path

from jaxrobust.runtime.text import patience

# glibc returns buffers above 128 KiB to the system after each use, so every step has their page
# faults again: a quarter of a ConvNeXt step on CPU. These keep them, on huge pages.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "2000000000",
    "MALLOC_TRIM_THRESHOLD_": "4000000000",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}

JOIN_TIMEOUT_S = 300.0  # long enough for a pod whose hosts start one after the other


def keep_large_buffers() -> None:
    """Restart this command with `ALLOCATOR` in its environment, and `without_tpu`.

    glibc reads these variables only when a process starts. Nothing happens if any of them is set,
    without glibc, or with `JAXROBUST_ALLOCATOR=system`.
    """
    without_tpu()
    if (
        platform.libc_ver()[0] != "glibc"
        or os.environ.get("JAXROBUST_ALLOCATOR") == "system"
        or any(name in os.environ for name in ALLOCATOR)
    ):
        return
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | ALLOCATOR)


def cores() -> int | None:
    """Count the cores for devices; None: the number of CPU devices was set explicitly."""
    forced = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if forced or "JAX_NUM_CPU_DEVICES" in os.environ:
        return None
    return own_cores()


def own_cores() -> int:
    """Count the cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def few_cores() -> str | None:
    """Warn about a process that may use only one core of its machine; None: it may use more."""
    total = os.cpu_count() or 1
    if own_cores() > 1 or total == 1:
        return None
    return (
        f"this process may use only one of {total} cores, so the devices will wait for images; "
        "start without CPU binding (srun --cpu-bind=none) and with more cores (--cpus-per-task 8)"
    )


def use_every_core() -> None:
    """Make JAX see one CPU device per core, unless a number was set; call before JAX starts."""
    if count := cores():
        os.environ["JAX_NUM_CPU_DEVICES"] = str(count)


def patient_collectives() -> None:
    """Let CPU devices wait for each other; call this before JAX's first computation.

    XLA aborts a process when one of its devices is 40 s late, as happens on a busy machine.
    """
    hour = "--xla_cpu_collective_call_terminate_timeout_seconds=3600"
    warning = "--xla_cpu_collective_call_warn_stuck_timeout_seconds=600"
    os.environ["XLA_FLAGS"] = f"{hour} {warning} {os.environ.get('XLA_FLAGS', '')}".strip()


def without_tpu(devices: Path = Path("/dev"), bus: Path = Path("/sys/bus/pci/devices")) -> bool:
    """Stop JAX from loading the TPU library on a machine without a TPU, where each process would
    print five lines of errors; return whether this was done.

    Nothing happens if the environment names a platform or configures a TPU, if the library is
    missing, or if JAX has a plug-in for another accelerator, which it must still look for.
    """
    configured = [name for name in os.environ if name.startswith(("TPU_", "JAX_PLATFORM"))]
    # $JAX_PLATFORMS only says where to look, and CUDA's plug-in aborts without a GPU.
    others = [m.name for m in pkgutil.iter_modules() if m.name.startswith("jax_")]
    if (plugins := importlib.util.find_spec("jax_plugins")) is not None:
        others += [m.name for m in pkgutil.iter_modules(plugins.submodule_search_locations)]
    if configured or others or not importlib.util.find_spec("libtpu") or _has_tpu(devices, bus):
        return False
    os.environ["JAX_PLATFORMS"] = "cpu"
    if loaded := sys.modules.get("jax"):  # it read the variable when it was imported
        loaded.config.update("jax_platforms", "cpu")
    return True


def _has_tpu(devices: Path, bus: Path) -> bool:
    """Return whether Google's card or a driver is here; also a GPU's, on which JAX says more."""
    if [device for name in ("accel*", "vfio/[0-9]*", "nvidia*") for device in devices.glob(name)]:
        return True
    for card in bus.glob("*"):
        try:
            vendor, kind = ((card / name).read_text().strip() for name in ("vendor", "class"))
        except OSError:
            continue
        if vendor == "0x1ae0" and not kind.startswith("0x02"):
            return True
    return False


def join_hosts(
    *,
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    timeout_s: float | None = None,
) -> None:
    """Connect the processes of a pod; return when all are connected.

    Call this before anything that asks JAX for its devices.
    Args:
      coordinator: host:port where process 0 listens; default: $JAX_COORDINATOR_ADDRESS.
      processes: number of processes; default: $JAX_NUM_PROCESSES.
      process: index of this process, from 0; default: $JAX_PROCESS_ID.
      timeout_s: seconds to wait for the others; default: `JOIN_TIMEOUT_S`.
    JAX finds missing values itself on Cloud TPU, Slurm, Kubernetes (GKE) and Open MPI.
    Raises:
      ValueError: a wrong value; no cluster found; a process did not arrive in time. A JAX thread
        may then still be waiting; it aborts the process when it gives up, so exit with `os._exit`.
    """
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS") or None
    processes = _from_environment(processes, "JAX_NUM_PROCESSES")
    process = _from_environment(process, "JAX_PROCESS_ID")
    timeout_s = JOIN_TIMEOUT_S if timeout_s is None else timeout_s
    _check_hosts(coordinator, processes, process, timeout_s)
    if coordinator and process == 0 and "JAX_COORDINATOR_BIND_ADDRESS" not in os.environ:
        _check_port(coordinator)
    import jax

    # JAX would catch SIGTERM to tell the others, which the training loop does itself. Outside the
    # loop (during a compilation), SIGTERM must end the process.
    jax.config.update("jax_enable_preemption_service", False)
    failures: list[Exception] = []

    def join() -> None:
        try:
            jax.distributed.initialize(
                coordinator, processes, process, initialization_timeout=int(timeout_s) + 60
            )
        except Exception as error:
            failures.append(error)

    # On a timeout, JAX aborts the whole process with a C++ stack trace. This wait gives up first,
    # outside JAX's call, which holds no lock meanwhile.
    joining = threading.Thread(target=join, name="join_hosts", daemon=True)
    joining.start()
    # The first host speaks for all; if the cluster assigns the numbers, it is not known yet.
    with patience.of("waiting for the other processes of the pod", here=not process):
        joining.join(timeout_s)
    if joining.is_alive():
        raise ValueError(_missing(coordinator, processes, process, timeout_s))
    if failures and isinstance(failures[0], ValueError):
        raise ValueError(
            "no cluster was found (Cloud TPU, Slurm, Kubernetes, Open MPI): give "
            "--coordinator_address host:port, --num_processes N and --process_id I on every host "
            f"({failures[0]})"
        ) from failures[0]
    if failures:
        where = f"at {coordinator}" if coordinator else "of the cluster"
        reason = str(failures[0]).splitlines()[0]
        raise ValueError(f"cannot join the hosts {where}: {reason}") from failures[0]


def _from_environment(value: int | None, name: str) -> int | None:
    if value is not None or not os.environ.get(name):
        return value
    try:
        return int(os.environ[name])
    except ValueError as error:
        raise ValueError(f"{name}={os.environ[name]} is not an integer; set it to one") from error


def _check_hosts(
    coordinator: str | None, processes: int | None, process: int | None, timeout_s: float
) -> None:
    if coordinator is not None:
        host, _, port = coordinator.rpartition(":")
        if not (host and port.isdecimal() and 0 < int(port) < 65536):
            raise ValueError(
                f"--coordinator_address {coordinator} is not host:port; write the address of "
                "process 0 and a free port there, such as 10.0.0.1:8476"
            )
    if processes is not None and processes < 1:
        raise ValueError(f"--num_processes {processes} must be at least 1")
    if process is not None and not 0 <= process < (processes or process + 1):
        raise ValueError(
            f"--process_id {process} is out of range for {processes or 'N'} processes; ids go "
            f"from 0 to {processes - 1 if processes else 'N - 1'}"
        )
    if not 0 < timeout_s < 1e6:
        raise ValueError(
            f"--coordinator_timeout {timeout_s:g} must be a number of seconds, such as 600"
        )


def listening(port: int, *, backlog: int | None = None) -> socket.socket:
    """Listen at a port on all addresses of this machine; 0: at any free port."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    return socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=backlog)


def _check_port(coordinator: str) -> None:
    """Reject a port that is in use, at which JAX may crash."""
    try:
        listening(int(coordinator.rpartition(":")[2])).close()
    except OSError as error:
        raise ValueError(
            f"--coordinator_address {coordinator}: process 0 cannot listen on this port "
            f"({os.strerror(error.errno or 0)}); choose a different port"
        ) from error


def _missing(
    coordinator: str | None, processes: int | None, process: int | None, timeout_s: float
) -> str:
    remedy = (
        "start the same command on every host, or wait longer with --coordinator_timeout SECONDS"
    )
    if coordinator and process:  # process 0 listens itself
        host, _, port = coordinator.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except OSError as error:
            return (
                f"process 0 did not answer at --coordinator_address {coordinator} within "
                f"{timeout_s:g} s ({error}); {remedy}"
            )
    return f"not all {processes or 'of the'} processes joined within {timeout_s:g} s; {remedy}"
