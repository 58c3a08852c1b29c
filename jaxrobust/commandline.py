"""Flags as people write them, and mistakes in them as one sentence."""

import os
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

from absl import flags

flags.disclaim_key_flags()  # the flags below are in the --help of the command that asks for them


def define_host_flags() -> None:
    """Defines the flags of a command that several hosts run together, for `hosts`."""
    join = "Join the other hosts of a TPU or GPU pod; start the command on each."
    flags.DEFINE_bool("multihost", False, join, allow_override=True)
    given = "Implies --multihost; found out on Cloud TPU, Slurm, GKE and such."
    address = f"host:port of process 0, where it waits for the others. {given}"
    flags.DEFINE_string("coordinator_address", None, address, allow_override=True)
    count, index = f"How many processes. {given}", f"Which one this is, from 0. {given}"
    flags.DEFINE_integer("num_processes", None, count, allow_override=True)
    flags.DEFINE_integer("process_id", None, index, allow_override=True)
    waits = "Seconds to wait for the others, 300 if not given. Implies --multihost."
    flags.DEFINE_float("coordinator_timeout", None, waits, allow_override=True)


def hosts() -> dict[str, Any] | None:
    """The arguments of `launch.join_hosts` that the flags give; None: this process is alone."""
    given = {
        "coordinator": flags.FLAGS.coordinator_address,
        "processes": flags.FLAGS.num_processes,
        "process": flags.FLAGS.process_id,
        "timeout_s": flags.FLAGS.coordinator_timeout,
    }
    several = flags.FLAGS.multihost or any(value is not None for value in given.values())
    return given if several else None


def stop(message: object, code: int) -> NoReturn:
    """Ends the process with a sentence on stderr."""
    print(f"jaxrobust: {message}", file=sys.stderr)
    sys.exit(code)


def leave(message: object, code: int, *, at_once: bool) -> NoReturn:
    """`stop`; `at_once` without waiting for other hosts, who may wait for this one."""
    if at_once:
        print(f"jaxrobust: {message}", file=sys.stderr, flush=True)
        os._exit(code)
    stop(message, code)


def number(flag: str, text: str) -> float:
    """The value of a flag that was written as a number or a fraction (`4/255`).

    Raises:
      ValueError: with how to write it.
    """
    try:
        return _fraction(text) if "/" in text else float(text)
    except ValueError as error:
        raise ValueError(
            f"--{flag}={text} is not a number; write one, or a fraction such as 4/255"
        ) from error


def parse(argv: list[str], *, hint: str = "configs/base.py lists every config key") -> list[str]:
    """absl's parser, with its errors as one sentence, and fractions such as 4/255 as values."""
    for i, argument in enumerate(argv):
        follows = i > 0 and re.fullmatch(r"--?config\.[\w.]+", argv[i - 1])
        if follows or re.match(r"--?config\.", argument):
            fraction = re.compile(r"(?<![^=])\d+(\.\d+)?/\d+$")
            argv[i] = fraction.sub(lambda m: str(_fraction(m[0])), argument)
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        if argument.lstrip("-").split("=")[0] == "config":
            path = Path(argument.partition("=")[2] or following)
            if not path.is_file():
                stop(f"--config {path}: no such file; try configs/quickstart.py", 2)
            sys.path.append(str(path.resolve().parent.parent))  # configs import configs.base
    try:
        return flags.FLAGS(argv)
    except (flags.Error, KeyError, AttributeError, TypeError, ValueError) as error:
        message = " ".join(str(error).replace("\\n", " ").split())
        if typo := re.search(r'Did you mean "(.+?)" instead of "(.+?)"', message):
            message = f"unknown config key {typo[2]!r}; did you mean {typo[1]!r}?"
        elif isinstance(error, (KeyError, AttributeError)):
            message = f"unknown config key {message.strip(chr(34))}"
        stop(f"{message} ({hint})", 2)


def _fraction(text: str) -> float:
    over, under = map(float, text.split("/"))
    return over / under if under else float("nan")
