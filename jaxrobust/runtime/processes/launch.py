"""What comes before JAX's first computation: allocator and cores on CPU, the hosts of a pod."""

import importlib.util
import os
import pkgutil
import platform
import socket
import sys
import threading
from pathlib import Path

from jaxrobust.runtime.text import patience

# glibc returns buffers above 128 KiB to the system after every use, so each step pays their page
# faults again: a quarter of a ConvNeXt step on CPU. These keep them, on huge pages.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "2000000000",
    "MALLOC_TRIM_THRESHOLD_": "4000000000",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}

JOIN_TIMEOUT_S = 300.0  # for a pod whose hosts start one after the other


def keep_large_buffers() -> None:
    """Start this very command again with `ALLOCATOR` in its environment, and `without_tpu`.

    glibc reads them once, when the process starts. Nothing happens where any of them is set,
    elsewhere than under glibc, or with `JAXROBUST_ALLOCATOR=system`.
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
    """Count the cores for devices; None: the process was told how many CPU devices to have."""
    forced = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if forced or "JAX_NUM_CPU_DEVICES" in os.environ:
        return None
    return own_cores()


def own_cores() -> int:
    """Count the cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def use_every_core() -> None:
    """Make JAX, before it starts, see a CPU device for each core, unless told a number."""
    if count := cores():
        os.environ["JAX_NUM_CPU_DEVICES"] = str(count)


def patient_collectives() -> None:
    """Let CPU devices wait for each other; to be called before JAX's first computation.

    XLA ends a process of which a device waits for 40 s, as on a machine with much else to do.
    """
    hour = "--xla_cpu_collective_call_terminate_timeout_seconds=3600"
    warning = "--xla_cpu_collective_call_warn_stuck_timeout_seconds=600"
    os.environ["XLA_FLAGS"] = f"{hour} {warning} {os.environ.get('XLA_FLAGS', '')}".strip()


def without_tpu(devices: Path = Path("/dev"), bus: Path = Path("/sys/bus/pci/devices")) -> bool:
    """Keep JAX from starting the TPU's library on a machine without a TPU, where each process
    would print five lines of its errors; return whether that was done.

    Nothing happens where the environment names a platform or configures a TPU, where the library is
    missing, or where JAX has a plug-in of another accelerator, which it must still look for.
    """
    configured = [name for name in os.environ if name.startswith(("TPU_", "JAX_PLATFORM"))]
    # $JAX_PLATFORMS can only say where to look, and CUDA's plug-in ends a process without a GPU.
    others = [m.name for m in pkgutil.iter_modules() if m.name.startswith("jax_")]
    if (plugins := importlib.util.find_spec("jax_plugins")) is not None:
        others += [m.name for m in pkgutil.iter_modules(plugins.submodule_search_locations)]
    if configured or others or not importlib.util.find_spec("libtpu") or _has_tpu(devices, bus):
        return False
    os.environ["JAX_PLATFORMS"] = "cpu"
    if loaded := sys.modules.get("jax"):  # which read the variable when it was imported
        loaded.config.update("jax_platforms", "cpu")
    return True


def _has_tpu(devices: Path, bus: Path) -> bool:
    """Tell whether a driver (also a GPU's, of which JAX says more) or Google's card is here."""
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
    """Connect the processes of a pod; return when all of them are there.

    To be called before anything that asks JAX for its devices.
    Args:
      coordinator: host:port of process 0, where it listens; default: $JAX_COORDINATOR_ADDRESS.
      processes: how many there are; default: $JAX_NUM_PROCESSES.
      process: which one this is, from 0; default: $JAX_PROCESS_ID.
      timeout_s: how long to wait for the others; default `JOIN_TIMEOUT_S`.
    What is not given, JAX finds out on Cloud TPU, Slurm, Kubernetes (GKE) and Open MPI.
    Raises:
      ValueError: a wrong value; no cluster is there; not everybody came in time. JAX may then still
        be waiting in a thread, which ends the process when it gives up: leave with `os._exit`.
    """
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS") or None
    processes = _from_environment(processes, "JAX_NUM_PROCESSES")
    process = _from_environment(process, "JAX_PROCESS_ID")
    timeout_s = JOIN_TIMEOUT_S if timeout_s is None else timeout_s
    _check_hosts(coordinator, processes, process, timeout_s)
    if coordinator and process == 0 and "JAX_COORDINATOR_BIND_ADDRESS" not in os.environ:
        _check_port(coordinator)
    import jax

    # JAX would catch SIGTERM to tell the others, which the training loop does itself; while that
    # does not run (a compilation), SIGTERM has to end the process.
    jax.config.update("jax_enable_preemption_service", False)
    failures: list[Exception] = []

    def join() -> None:
        try:
            jax.distributed.initialize(
                coordinator, processes, process, initialization_timeout=int(timeout_s) + 60
            )
        except Exception as error:
            failures.append(error)

    # JAX aborts the whole process, with a stack trace of C++, where it runs out of time: we are
    # first, from the outside of its call, which holds no lock meanwhile.
    joining = threading.Thread(target=join, name="join_hosts", daemon=True)
    joining.start()
    # The first host speaks for all; where the cluster counts them, nobody knows yet who that is.
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
        raise ValueError(f"{name}={os.environ[name]} is not an integer; write one") from error


def _check_hosts(
    coordinator: str | None, processes: int | None, process: int | None, timeout_s: float
) -> None:
    if coordinator is not None:
        host, _, port = coordinator.rpartition(":")
        if not (host and port.isdecimal() and 0 < int(port) < 65536):
            raise ValueError(
                f"--coordinator_address {coordinator} is not host:port; write the address of "
                "process 0 and a port that is free there, such as 10.0.0.1:8476"
            )
    if processes is not None and processes < 1:
        raise ValueError(f"--num_processes {processes} must be at least 1")
    if process is not None and not 0 <= process < (processes or process + 1):
        raise ValueError(
            f"--process_id {process} is not one of {processes or 'N'} processes; they count "
            f"from 0{f' to {processes - 1}' if processes else ''}"
        )
    if not 0 < timeout_s < 1e6:
        raise ValueError(
            f"--coordinator_timeout {timeout_s:g} must be a number of seconds, such as 600"
        )


def listening(port: int, *, backlog: int | None = None) -> socket.socket:
    """Listen at a port of all addresses of this machine; 0: at any that is free."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    return socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=backlog)


def _check_port(coordinator: str) -> None:
    """Refuse a port that is taken, at which JAX may crash."""
    try:
        listening(int(coordinator.rpartition(":")[2])).close()
    except OSError as error:
        raise ValueError(
            f"--coordinator_address {coordinator}: process 0 cannot listen at its port "
            f"({os.strerror(error.errno or 0)}); choose a different one"
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
                f"no process answers at --coordinator_address {coordinator} within {timeout_s:g} s "
                f"({error}); that is process 0: {remedy}"
            )
    return (
        f"of {processes or 'the'} processes, some were not there within {timeout_s:g} s; {remedy}"
    )
