"""`python -m jaxrobust.main --config FILE [--workdir DIR] [--config.a.b=v ...]`: trains a network.

Exit codes: 0 done; 2 a mistake in the command or the data, with one sentence on stderr; 3 the run
stopped for another reason that it names (NaN, full disk, the data of another host). The same
command continues after: 75 preempted (SIGTERM) and saved, 143 where it was not training yet or no
longer; 130 interrupted (Ctrl-C).
"""

import traceback
from functools import partial
from typing import Any

from absl import app, flags
from ml_collections import config_flags

from jaxrobust.runtime.commandline import (
    config_name,
    define_host_flags,
    hosts,
    leave,
    parse,
    quiet_libraries,
    stop,
)
from jaxrobust.runtime.launch import join_hosts, keep_large_buffers

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where checkpoints, metrics and results go; default: runs/<config>."
)
_PROFILE = flags.DEFINE_string(
    "profile",
    None,
    "START:STEPS traces STEPS steps of each phase for XProf, after the first START of this run.",
)
define_host_flags()


def main(argv: list[str]) -> None:
    """Read the flags and run the config."""
    if len(argv) > 1 or _CONFIG.value is None:
        stop("give --config FILE, and changes as --config.key=value; nothing else", 2)
    quiet_libraries()
    from jaxrobust.report import pictures
    from jaxrobust.runtime import folders, profiling
    from jaxrobust.training import run as training_run  # after the flags: --help needs no JAX
    from jaxrobust.training.stopping import Stopped
    from jaxrobust.weights.checkpoint import DiskFull

    name = config_name(config_flags.get_config_filename(flags.FLAGS["config"]))
    pod = hosts()
    end = partial(leave, at_once=pod is not None)  # other hosts may wait for this one
    workdir = None
    try:
        workdir = folders.mounted("workdir", _WORKDIR.value or f"runs/{name}")
        profile = profiling.profile(_PROFILE.value) if _PROFILE.value else None
        if pod is not None:
            join_hosts(**pod)
        training_run.run(_CONFIG.value, workdir, profile=profile, draw=pictures.of_phase)
    except Stopped as error:  # all hosts together
        stop(error, error.code)
    except KeyboardInterrupt:
        end(f"interrupted; the same command {_continues(workdir)}", 130)
    except (ValueError, DiskFull) as error:
        end(error, 2 if isinstance(error, ValueError) else 3)
    except OSError as error:
        end(f"{error}. With that solved, the same command {_continues(workdir)}", 3)
    except Exception as error:
        if pod is None:
            raise
        traceback.print_exc()  # and go, else the others wait for this one
        end(error, 1)


def _continues(workdir: Any) -> str:
    """Return what the same command does, by what is in the folder of the run."""
    saved = workdir is not None and any(
        next((workdir / kind.name / "latest").glob("[0-9]*"), None) is not None
        for kind in workdir.glob("*/")
    )
    return "continues at the last checkpoint" if saved else "starts again; nothing was saved yet"


if __name__ == "__main__":
    keep_large_buffers()
    app.run(main, flags_parser=parse)
