"""Checkpoints of a run, written in the background by Orbax, the latest one kept."""

import contextlib
import errno
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from jaxrobust.runtime.devices import sharding
from jaxrobust.runtime.files import whole
from jaxrobust.runtime.files.whole import DiskFull, disk_full
from jaxrobust.runtime.text import patience


class Checkpoints:
    """Saves arrays and JSON under `directory/<step>`, where a new step replaces the one before.

    A step appears under its number only when it is complete, and the one before goes only then, so
    that a kill at any moment leaves one to continue from. With `keep_all` every step stays.
    """

    def __init__(self, directory: Path, *, read_only: bool = False, keep_all: bool = False) -> None:
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.LatestN(None if keep_all else 1),
            cleanup_tmp_directories=not read_only,  # they may be those of a run that goes on
            read_only=read_only,
        )
        handlers = {"arrays": ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
        self.directory = directory.absolute()  # Orbax refuses relative paths
        self._size = 0  # bytes of what is written
        saved = steps(self.directory)
        last = max(filter(self._whole, saved), default=None)
        if saved and saved[-1] != last:  # nothing of ours; Orbax would take it
            raise ValueError(
                f"{self.directory / str(saved[-1])} is no whole checkpoint: move it away, and the "
                f"same command continues at {f'step {last}' if last else 'the start'}"
            )
        if not (read_only or keep_all) and jax.process_index() == 0:
            for step in saved[:-1]:  # a kill came while it was removed
                shutil.rmtree(self.directory / str(step))
        self._manager = ocp.CheckpointManager(
            self.directory, options=options, item_handlers=handlers
        )

    def latest_step(self) -> int | None:
        """Find the newest checkpoint, complete after `wait`; None where there is none.

        From memory: another host may list a shared folder as it was a minute ago.
        """
        return self._manager.latest_step()

    def _whole(self, step: int) -> bool:
        return all((self.directory / str(step) / item).is_dir() for item in ("arrays", "meta"))

    def save(self, step: int, arrays: Any, meta: dict) -> None:
        """Start writing `arrays` and `meta` (JSON); a step that is there already stays."""
        kinds = {"arrays": ocp.args.StandardSave(arrays), "meta": ocp.args.JsonSave(meta)}
        items = ocp.args.Composite(**kinds)
        self.wait()
        self._size = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
        if step != self.latest_step():
            with self._explained(), _lasting(f"writing the checkpoint of step {step}"):
                self._manager.save(step, args=items, force=True)

    def restore(self, step: int, abstract: Any) -> Any:
        """Read arrays with shapes, types and shardings of `abstract`; refuse another network's."""
        self._same_network(step, abstract)
        items = ocp.args.Composite(arrays=ocp.args.StandardRestore(abstract))
        with _lasting(f"reading the checkpoint of step {step}"):
            return self._manager.restore(step, args=items)["arrays"]

    def meta(self, step: int) -> dict:
        """Read the JSON that was saved beside the arrays."""
        items = ocp.args.Composite(meta=ocp.args.JsonRestore())
        return self._manager.restore(step, args=items)["meta"]

    def clear(self) -> None:
        """Remove all; a kill leaves each step whole or gone. To be called by all hosts."""
        self.wait()
        if jax.process_index() == 0:
            for step in steps(self.directory):
                gone = self.directory / f"{step}.orbax-checkpoint-tmp"  # goes at the next start
                (self.directory / str(step)).rename(gone)
                shutil.rmtree(gone)
        multihost_utils.sync_global_devices("cleared")
        self._manager.reload()

    def wait(self) -> None:
        """Wait until everything is on disk; raise the error of a write that failed."""
        with self._explained(), _lasting("writing a checkpoint"):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """End the background threads."""
        self._manager.close()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn a full disk, however deep it was noticed, into one sentence."""
        try:
            yield
        except Exception as error:
            if not disk_full(error):
                raise
            if jax.process_index() == 0:  # on a full disk every byte counts
                for half in self.directory.glob("*.orbax-checkpoint-tmp"):
                    shutil.rmtree(half, ignore_errors=True)
            last = max(steps(self.directory), default=None)
            there = f"The last good one is step {last}"
            good = "There is no good one yet" if last is None else there
            raise DiskFull(
                errno.ENOSPC,
                f"the disk is full: a checkpoint of {whole.amount(self._size)} under "
                f"{self.directory} could not be written. {good}. Free some space and run the same "
                "command again: it continues there",
            ) from error

    def _same_network(self, step: int, abstract: Any) -> None:
        def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
            return {name: tuple(leaf.shape) for name, leaf in tree.items()}

        saved = shapes(self._manager.item_metadata(step)["arrays"].tree["params"])
        wanted = shapes(abstract.params)
        differing = sorted(
            name for name in saved.keys() | wanted.keys() if saved.get(name) != wanted.get(name)
        )
        if differing:
            lines = [f"{n}: saved {saved.get(n)}, wanted {wanted.get(n)}" for n in differing[:5]]
            raise ValueError(
                f"{self.directory / str(step)} holds another network ({len(differing)} parameters "
                "differ); use its own config, or a new --workdir:\n  " + "\n  ".join(lines)
            )


def _lasting(what: str) -> contextlib.AbstractContextManager:
    return patience.lasting(what, here=jax.process_index() == 0)


def read(directory: Path, abstract: Any, step: int | None = None) -> tuple[int, Any, dict]:
    """Read a step (default: the latest) of a run that may go on: its number, arrays, meta."""
    everywhere = sharding.replicated(sharding.make_mesh())
    with contextlib.closing(Checkpoints(directory, read_only=True)) as checkpoints:
        step = checkpoints.latest_step() if step is None else step
        assert step is not None
        arrays = checkpoints.restore(step, abstract_state(abstract, everywhere))
        return step, arrays, checkpoints.meta(step)


def steps(directory: Path) -> list[int]:
    """List the steps that have a folder in a directory of checkpoints, in order."""
    folders = [path.name for path in directory.glob("*") if path.is_dir()]
    return sorted(int(name) for name in folders if re.fullmatch("0|[1-9][0-9]*", name))


def abstract_state(state: Any, place: jax.sharding.Sharding) -> Any:
    """Give shapes and types of a state, all under one sharding: what `restore` wants."""
    shaped = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)  # noqa: E731
    return jax.tree.map(shaped, state)
