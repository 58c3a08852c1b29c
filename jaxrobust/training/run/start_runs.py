"""The runs that a config starts from: reused, resumed, or trained first."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from jaxrobust.config import Config, phases
from jaxrobust.runtime.processes import hosts
from jaxrobust.runtime.text.progress import say
from jaxrobust.training.run import stopping
from jaxrobust.weights import start as start_weights
from jaxrobust.weights.store.steps import steps
from jaxrobust.weights.trained import start_run
from jaxrobust.weights.trained.start_run import ABSENT, BEGUN, FINISHED, StartRun

# What to do when another process holds the lock of a start's folder.
OTHERWISE = "repeat this command after that run has ended, to start from its weights"


def before(config: Config, workdir: Path) -> list[StartRun]:
    """List the runs to train before this one, in order, and announce which are used.

    A run that has begun needs none. The first host decides for all.
    Raises:
      ValueError: a start that does not fit this network, or another run in its folder.
    """
    hosts.agree({"init.weights": config.init.weights}, problem="starts from other weights")
    wanted = start_run.named(config.init.weights)
    if not wanted or hosts.first(bool(steps(workdir / phases(config)[0] / "latest"))):
        return []
    first: list[StartRun] = []
    for start, state in hosts.together(lambda: _states(config, workdir)):
        say(f"{start.words}: {_said(start, state)}")
        if state == FINISHED:
            break
        first.insert(0, start)
    return first


def fitting(config: Config, workdir: Path) -> list[StartRun]:
    """List the runs that a run starts from, the nearest first; reject those of another network."""
    chain = start_run.chain(config, workdir)
    for start, after in zip(chain, [config, *(one.config for one in chain)], strict=False):
        start_weights.check_run(start.config, after)
    return chain


def _states(config: Config, workdir: Path) -> list[tuple[StartRun, str]]:
    chain = fitting(config, workdir)
    states = hosts.everyone([start_run.state(start) for start in chain])[0]
    return list(zip(chain, states, strict=True))


def _said(run: StartRun, state: str) -> str:
    file, colon, words = run.named.partition(":")
    if not Path(file).is_file():  # one of the recipes
        file = f"configs/{Path(file).stem}.py"
    return {
        FINISHED: f"using the best weights of the finished run in {run.folder}",
        BEGUN: f"first resuming the unfinished run in {run.folder}, which this run starts from",
        ABSENT: (
            f"first training the run in {run.folder}, which other runs can start from too, as with "
            f"jaxrobust train --config {file}{colon}{words} --workdir {run.folder}"
        ),
    }[state]


@contextlib.contextmanager
def explained(run: StartRun) -> Iterator[None]:
    """Add to an error that stops a start's training that it concerns the start."""
    words = f"the run in {run.folder}, which this run starts from"
    try:
        yield
    except stopping.Stopped as error:
        raise type(error)(f"{words}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{words}: {error}") from error


def again(config: Config, workdir: Path) -> str:
    """Say how to continue a run, or one that comes before it, with the same command."""
    runs = [(workdir, config, "")]
    with contextlib.suppress(ValueError, OSError):
        runs += [(r.folder, r.config, f" in {r.folder}") for r in start_run.chain(config, workdir)]
    try:
        for folder, run_config, where in runs:
            if any(
                steps(folder / name / kind)
                for name in run_config.phases
                for kind in ("latest", "stopped")
            ):
                return stopping.again(folder, run_config.phases) + where
        return stopping.again(workdir, config.phases)
    except OSError:  # the bucket is gone
        return "run the same command to continue at the last complete checkpoint"
