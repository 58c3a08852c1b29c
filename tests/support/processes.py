"""Commands in several processes that find each other."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from tests.support import compiling, paths
from tests.support.runs import tiny


def start(processes: int, devices: int, command: list[str], **given) -> list[subprocess.Popen]:
    """The command in so many processes with so many CPU devices each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    started = []
    for index in range(processes):
        environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
        environment |= {"JAX_NUM_CPU_DEVICES": str(devices), "JAXROBUST_ALLOCATOR": "system"}
        environment["JAX_PLATFORMS"] = "cpu"  # no search for a TPU
        environment["XLA_FLAGS"] = compiling.FLAGS  # each of them compiles for itself
        if processes > 1:
            environment |= {
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(index),
            }
        started.append(
            subprocess.Popen(
                [sys.executable, *command],
                cwd=paths.ROOT,
                env=environment | given,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return started


def wait(started: list[subprocess.Popen], seconds: float = 200) -> tuple[list[int], list[str]]:
    """Their exit codes, and what they said on stderr."""
    said = [process.communicate(timeout=seconds)[1] for process in started]
    return [process.returncode for process in started], said


def environment(**more: str) -> dict[str, str]:
    """This one's, as on a host with one CPU device that is told of no cluster."""
    others = ("JAX_COORDINATOR", "JAX_NUM_P", "JAX_PROCESS", "SLURM_", "XLA_FLAGS")
    plain = {k: v for k, v in os.environ.items() if not k.startswith(others)}
    return plain | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(paths.ROOT)} | more


COMMAND = ["-m", "jaxrobust.main"]


def written(folder: Path, **changes) -> list[str]:
    """The command for a config of `tiny`, its adversarial phase alone."""
    config = tiny(pretrain__epochs=0, log__every_steps=1, **changes)
    path = folder / "config.py"
    path.write_text(
        "from ml_collections import ConfigDict\n\n\ndef get_config():\n"
        f"    return ConfigDict({config.to_dict()!r})\n"
    )
    return [*COMMAND, f"--config={path}"]
