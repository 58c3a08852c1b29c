"""`python -m jaxrobust.main --config FILE [--workdir DIR] [--config.a.b=v ...]`: trains a network.

Exit codes: 0 done; 2 a mistake in the command or the data, with one sentence on stderr; 3 the run
stopped for another reason that it names (NaN, full disk); 130 interrupted, resumable.
"""

import re
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from jaxrobust.launch import join_hosts, keep_large_buffers

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where checkpoints, metrics and results go; default runs/<config>."
)
_MULTIHOST = flags.DEFINE_bool(
    "multihost", False, "Join the other hosts of a TPU or GPU pod; start the command on each."
)


def _say(message: object, code: int) -> None:
    print(f"jaxrobust: {message}", file=sys.stderr)
    sys.exit(code)


def _parse(argv: list[str]) -> list[str]:
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
                _say(f"--config {path}: no such file; try configs/quickstart.py", 2)
            sys.path.append(str(path.resolve().parent.parent))  # configs import configs.base
    try:
        return flags.FLAGS(argv)
    except (flags.Error, KeyError, AttributeError, TypeError, ValueError) as error:
        message = " ".join(str(error).replace("\\n", " ").split())
        if typo := re.search(r'Did you mean "(.+?)" instead of "(.+?)"', message):
            message = f"unknown config key {typo[2]!r}; did you mean {typo[1]!r}?"
        elif isinstance(error, (KeyError, AttributeError)):
            message = f"unknown config key {message.strip(chr(34))}"
        _say(f"{message} (configs/base.py lists every config key)", 2)
        raise


def _fraction(text: str) -> float:
    over, under = map(float, text.split("/"))
    return over / under if under else float("nan")


def main(argv: list[str]) -> None:
    """Reads the flags and runs the config."""
    if len(argv) > 1 or _CONFIG.value is None:
        _say("give --config FILE, and changes as --config.key=value; nothing else", 2)
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax tells 30 lines a checkpoint
    from jaxrobust import train  # after the flags: --help needs no JAX

    name = Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    workdir = Path(_WORKDIR.value or Path("runs") / name)
    if "://" in str(_WORKDIR.value):
        _say(f"--workdir {_WORKDIR.value}: give a local or mounted folder", 2)
    try:
        if _MULTIHOST.value:
            join_hosts()
        train.run(_CONFIG.value, workdir)
    except train.Interrupted as error:
        _say(error, 130)
    except KeyboardInterrupt:
        _say("interrupted; the same command continues at the last checkpoint", 130)
    except ValueError as error:
        _say(error, 2)
    except (train.Diverged, OSError) as error:
        _say(error, 3)


if __name__ == "__main__":
    keep_large_buffers()
    app.run(main, flags_parser=_parse)
