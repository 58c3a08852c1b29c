"""`python -m jaxrobust.main --config FILE [--workdir DIR] [--config.a.b=v ...]`: trains a network.

Exit codes: 0 done; 2 a mistake in the command or the data, with one sentence on stderr; 3 the run
stopped for another reason that it names (NaN, full disk); 130 interrupted, resumable.
"""

import sys
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

from jaxrobust.launch import keep_large_buffers

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where checkpoints, metrics and results go; default runs/<config>."
)


def _say(message: object, code: int) -> None:
    print(f"jaxrobust: {message}", file=sys.stderr)
    sys.exit(code)


def _parse(argv: list[str]) -> list[str]:
    """absl's parser, with its errors as one sentence; configs import each other by name."""
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        if argument.lstrip("-").split("=")[0] == "config":
            path = Path(argument.partition("=")[2] or following)
            if not path.is_file():
                _say(f"--config {path}: no such file; try configs/quickstart.py", 2)
            sys.path.append(str(path.resolve().parent.parent))
    try:
        return flags.FLAGS(argv, known_only=False)
    except (flags.Error, KeyError, AttributeError, TypeError, ValueError) as error:
        message = " ".join(str(error.args[0] if error.args else error).split())
        _say(f"{message}; configs/base.py lists every config key", 2)
        raise


def main(argv: list[str]) -> None:
    """Reads the flags and runs the config."""
    if len(argv) > 1 or _CONFIG.value is None:
        _say("give --config FILE, and changes as --config.key=value; nothing else", 2)
    from jaxrobust import train  # after the flags: --help needs no JAX

    name = Path(flags.FLAGS["config"].config_filename).stem
    workdir = Path(_WORKDIR.value or Path("runs") / name)
    try:
        train.run(_CONFIG.value, workdir)
    except train.Interrupted as error:
        _say(error, 130)
    except ValueError as error:
        _say(error, 2)
    except (train.Diverged, OSError) as error:
        _say(error, 3)


if __name__ == "__main__":
    keep_large_buffers()
    app.run(main, flags_parser=_parse)
