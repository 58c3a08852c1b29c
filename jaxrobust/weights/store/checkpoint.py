"""Checkpoints of a run, written in the background by Orbax; only the latest one is kept.

On disk, a step gets its name when it is complete. Objects have no folders to rename, so in a bucket
a complete step has the file `commit_success.txt`, and while this class writes or removes one, the
object `STEP.orbax-checkpoint-tmp` says so. Only such steps are cleaned up: one without either may
be complete, from a disk or an older Orbax, whose AUTO mode would remove it.

Next to a step's arrays, `meta/metadata` holds JSON with the SHA-256 of each array and of the JSON
itself. For arrays that `fsdp` splits over several hosts, `meta/blocks_0`, `blocks_1`, ... hold the
SHA-256 of the blocks that each process wrote. All are checked whenever a checkpoint is read.
"""

import contextlib
import dataclasses
import errno
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from jaxrobust.runtime.devices import sharding
from jaxrobust.runtime.files import buckets, whole
from jaxrobust.runtime.files.whole import DiskFull, disk_full
from jaxrobust.runtime.processes import hosts
from jaxrobust.runtime.text import patience
from jaxrobust.runtime.text.progress import say
from jaxrobust.weights.store import blocks, hashes
from jaxrobust.weights.store.steps import MARKER, UNFINISHED, place_of, steps

_ARRAYS, _SEAL = "arrays_sha256", "meta_sha256"  # in the JSON: of each array, of all other keys


class _MetaHandler(ocp.JsonCheckpointHandler):
    """Hashes arrays on the host and writes JSON, both in the background thread of a save."""

    async def async_save(self, directory: Any, item: Any = None, args: Any = None) -> Any:
        async def write() -> None:
            whole_arrays: dict[str, str] = {}
            blocks: dict[str, dict[str, str]] = {}
            for (name, index), block in args.host.items():
                sha256 = hashes.array_sha256(block)
                if index:
                    blocks.setdefault(name, {})[index] = sha256
                else:
                    whole_arrays[name] = sha256
            process = jax.process_index()
            files = {"metadata": args.meta | {_ARRAYS: whole_arrays}} if process == 0 else {}
            files |= {f"blocks_{process}": {_ARRAYS: blocks}} if blocks else {}
            for name, values in files.items():
                sealed = values | {_SEAL: hashes.config_sha256(values)}
                (directory / name).write_text(json.dumps(sealed))

        return [ocp.future.CommitFutureAwaitingContractedSignals(write(), name="meta")]


@ocp.checkpoint_args.register_with_handler(_MetaHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class _Meta(ocp.args.CheckpointArgs):
    meta: dict[str, Any]
    host: dict[tuple[str, str], np.ndarray]  # what this process hashes, see `blocks.on_host`


class Checkpoints:
    """Saves arrays and JSON under `directory/<step>`; a new step replaces the previous one.

    A step gets its number only when it is complete, and only then the previous one is removed, so a
    kill at any moment leaves one to continue from. With `keep_all` every step stays.
    """

    def __init__(self, directory: Path, *, read_only: bool = False, keep_all: bool = False) -> None:
        self._files, self.directory = directory, place_of(directory)
        self._in_bucket = buckets.address(directory) is not None
        self._size = 0  # bytes written
        self._last: int | None = None  # the last complete step
        self._saving: int | None = None
        atomicity = ocp.path.atomicity  # explicit, as AUTO differs between versions of Orbax
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.LatestN(None if keep_all else 1),
            # Unfinished steps may belong to a run that continues, or be complete without a marker.
            cleanup_tmp_directories=not (read_only or self._in_bucket),
            read_only=read_only,
            temporary_path_class=atomicity.CommitFileTemporaryPath
            if self._in_bucket
            else atomicity.AtomicRenameTemporaryPath,
        )
        handlers = {"arrays": ocp.StandardCheckpointHandler(), "meta": _MetaHandler()}
        self._writes = not read_only and jax.process_index() == 0
        with self._explained():
            if self._writes and self._in_bucket:
                self._end_unfinished()
            saved = steps(directory)
            last = self._last = max(filter(self._whole, saved), default=None)
        if saved and saved[-1] != last:  # not ours, but Orbax would take it
            raise ValueError(self._incomplete(saved[-1], last))
        with self._explained():
            for step in saved[:-1] if self._writes and not keep_all else ():
                if not self._in_bucket or self._whole(step):
                    epath.Path(self.directory / str(step)).rmtree()  # as a kill interrupted Orbax
            self._manager = ocp.CheckpointManager(
                self.directory, options=options, item_handlers=handlers
            )

    def _incomplete(self, step: int, last: int | None) -> str:
        folder, there = self.directory / str(step), f"step {last}" if last else "the start"
        if self._in_bucket and (folder / "arrays").is_dir() and (folder / "meta").is_dir():
            return (
                f"{folder} has no {MARKER}, so it may be incomplete. If the original was complete, "
                "create this file; otherwise, move the folder away. Then run the same command to "
                f"continue at {there}"
            )
        return (
            f"{folder} is not a complete checkpoint: move it away, and run the same command to "
            f"continue at {there}"
        )

    def _note(self, step: int) -> Any:
        return self.directory / f"{step}{UNFINISHED}"

    def _end_unfinished(self) -> None:
        """Remove steps in a bucket that a kill left unfinished or half removed."""
        for note in self.directory.glob(f"*{UNFINISHED}"):
            step = self.directory / note.name.removesuffix(UNFINISHED)
            if not (step / MARKER).exists():
                step.rmtree(missing_ok=True)
            note.unlink()

    def latest_step(self) -> int | None:
        """Return the newest checkpoint, complete after `wait`; None if there is none.

        Answers from memory: another host may see an outdated listing of a shared folder.
        """
        return self._manager.latest_step()

    def _whole(self, step: int) -> bool:
        folder = self.directory / str(step)
        has_marker = not self._in_bucket or (folder / MARKER).exists()
        return has_marker and all((folder / item).is_dir() for item in ("arrays", "meta"))

    def save(self, step: int, arrays: Any, meta: dict) -> None:
        """Start writing `arrays` and `meta` (JSON); an existing step stays."""
        self.wait()
        self._size = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
        if step != self.latest_step():
            # A copy: the next step overwrites the arrays, which the thread still has to hash.
            meta_and_host = _Meta(meta, blocks.on_host(arrays))
            kinds = {"arrays": ocp.args.StandardSave(arrays), "meta": meta_and_host}
            with self._explained(), _lasting(f"writing the checkpoint of step {step}"):
                buckets.upload(self._files)  # a run that continues here needs the lines before
                if self._in_bucket and self._writes:
                    self._note(step).write_text("")
                    self._saving = step
                self._manager.save(step, args=ocp.args.Composite(**kinds), force=True)

    def restore(self, step: int, abstract: Any) -> Any:
        """Read arrays with the shapes, types and shardings of `abstract`.

        Raises:
          ValueError: they belong to another network, or differ from what was saved.
        """
        expected = {(n, ""): sha for n, sha in self._read_meta(step).get(_ARRAYS, {}).items()}
        files = sorted((self.directory / str(step) / "meta").glob("blocks_*"))
        for file in files:
            of_file = self._read_meta(step, file.name)[_ARRAYS]
            expected |= {(n, i): sha for n, rows in of_file.items() for i, sha in rows.items()}
        with self._readable(step):
            # In a bucket, managers on other hosts than the first take new items for unfinished.
            folder = epath.Path(self.directory / str(step) / "arrays")
            saved = ocp.StandardCheckpointHandler().metadata(folder).tree["params"]
        self._same_network(step, saved, abstract)
        items = ocp.args.Composite(arrays=ocp.args.StandardRestore(abstract))
        with _lasting(f"reading the checkpoint of step {step}"), self._readable(step):
            arrays = self._manager.restore(step, args=items)["arrays"]
        leaves, bad = blocks.by_name(arrays), []
        sizes: dict[tuple[str, str], int] = {}  # of the blocks to check
        for (name, index), sha256 in expected.items():
            if name in leaves and (part := blocks.block(leaves[name], index)) is not None:
                sizes[name, index] = part.size
                bad += [name] if hashes.array_sha256(part) != sha256 else []
        if files:  # each process holds some of the blocks, and all must stop
            findings = hosts.everyone((bad, sizes))
            bad = [name for names, _ in findings for name in names]
            sizes = {key: size for _, of_process in findings for key, size in of_process.items()}
        if bad:
            raise self._damaged(step, f"{bad[0]} has a different sha256 than when it was saved")
        compared = Counter[str]()
        for (name, _), size in sizes.items():
            compared[name] += size
        if unknown := sum(compared[name] < leaf.size for name, leaf in leaves.items()):
            say(
                f"{self.directory / str(step)}: these devices cannot compare the hashes of "
                f"{unknown} of its arrays, so damage to them would go unnoticed"
            )
        return arrays

    def meta(self, step: int) -> dict:
        """Read the JSON saved next to the arrays."""
        meta = self._read_meta(step)
        return {key: value for key, value in meta.items() if key not in (_ARRAYS, _SEAL)}

    def clear(self) -> None:
        """Remove all checkpoints, each atomically even if killed; all hosts must call this."""
        self.wait()
        if jax.process_index() == 0:
            for step in steps(self._files):
                self._clear(step)
        multihost_utils.sync_global_devices("cleared")
        self._manager.reload()

    def _clear(self, step: int) -> None:
        folder, note = epath.Path(self.directory / str(step)), epath.Path(self._note(step))
        if self._in_bucket:  # what remains after a kill is removed at the next start
            note.write_text("")
            (folder / MARKER).unlink(missing_ok=True)
            folder.rmtree()
            note.unlink()
        else:
            folder.rename(note)
            note.rmtree()

    def wait(self) -> None:
        """Wait until everything is stored; raise the error of a failed write."""
        with self._explained(), _lasting("writing a checkpoint"):
            self._manager.wait_until_finished()
            if self._saving is not None:
                self._note(self._saving).unlink()
                self._saving = None
            self._last = self._manager.latest_step()

    def close(self) -> None:
        """Stop the background threads."""
        with self._explained():
            self._manager.close()

    def _read_meta(self, step: int, name: str = "metadata") -> dict[str, Any]:
        with self._readable(step):
            meta = dict(json.loads((self.directory / str(step) / "meta" / name).read_text()))
        seal = meta.pop(_SEAL, None)
        if (seal or _ARRAYS in meta) and hashes.config_sha256(meta) != seal:
            raise self._damaged(step, f"meta/{name} has a different sha256 than when it was saved")
        return meta

    @contextlib.contextmanager
    def _readable(self, step: int) -> Iterator[None]:
        """Turn any error caused by damaged files into one sentence."""
        hook, is_damaged = _ignore_later_errors(), False
        try:
            yield
        except (MemoryError, PermissionError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:
            buckets.check(self._files)
            is_damaged = True
            raise self._damaged(step, "its files cannot be read") from error
        finally:
            if not is_damaged:
                sys.unraisablehook = hook

    def _damaged(self, step: int, reason: str) -> ValueError:
        """Return the error for a damaged checkpoint, RUN/PHASE/KIND/STEP, and the alternatives."""
        kind, phase = self.directory.name, self.directory.parent
        there = [other for other in steps(self.directory) if other != step]
        earlier = [other for other in there if other < step]
        options = [f"the previous step ({earlier[-1]})"] if earlier else []
        options += [f"a later step ({there[0]})"] if there and not earlier else []
        kinds = {"latest": "the latest checkpoint", "best": "the best weights"}
        kinds["stopped"] = "the checkpoint of the last stop"
        if kind == "best":
            kinds["latest"] += ", which the training command then evaluates"
        options += [
            f"{words} ({phase.name}/{other}/{there[-1]})"
            for other, words in kinds.items()
            if other != kind and (there := steps(phase / other))
        ]
        options += [
            f"another phase ({path.parent.name})"
            for path in sorted(phase.parent.glob(f"*/{kind}"))
            if path != self.directory and steps(path)
        ]
        options += ["the start of the phase, where training begins again"] * (kind == "latest")
        return ValueError(
            f"{self.directory / str(step)} is damaged ({reason}); restore it from a copy, or "
            + (
                f"move it away and use {' or '.join(options)}"
                if options
                else "train again in another folder"
            )
        )

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn a full disk or an unreachable bucket, however deep, into one sentence."""
        try:
            yield
        except Exception as error:
            if self._in_bucket:
                _ignore_later_errors()
                raise self._unreachable(error) from error
            if not disk_full(error):
                raise
            if jax.process_index() == 0:  # on a full disk every byte counts
                for half in self.directory.glob(f"*{UNFINISHED}"):
                    epath.Path(half).rmtree(missing_ok=True)
            last = max(steps(self._files), default=None)
            there = f"The last good one is step {last}"
            good = "There is no good one yet" if last is None else there
            raise DiskFull(
                errno.ENOSPC,
                f"the disk is full: a checkpoint of {whole.amount(self._size)} under "
                f"{self.directory} could not be written. {good}. Free some space, then run the "
                "same command to continue",
            ) from error

    def _unreachable(self, error: Exception) -> buckets.BucketError:
        reason = str(error) if isinstance(error, buckets.BucketError) else ""
        if not reason:
            words = " ".join(str(error).split(" [")[0].split()) or type(error).__name__
            reason = f"checkpoints in {self.directory} cannot be written or read ({words})"
        last = f"step {self._last}" if self._last is not None else "none"
        return buckets.BucketError(f"{reason}; last complete checkpoint there: {last}")

    def _same_network(self, step: int, params: Any, abstract: Any) -> None:
        def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
            return {name: tuple(leaf.shape) for name, leaf in tree.items()}

        saved, wanted = shapes(params), shapes(abstract.params)
        differing = sorted(
            name for name in saved.keys() | wanted.keys() if saved.get(name) != wanted.get(name)
        )
        if differing:
            lines = [f"{n}: saved {saved.get(n)}, wanted {wanted.get(n)}" for n in differing[:5]]
            raise ValueError(
                f"{self.directory / str(step)} holds another network ({len(differing)} parameters "
                "differ); use its config, or another folder:\n  " + "\n  ".join(lines)
            )


def _ignore_later_errors() -> Callable[..., Any]:
    """Hide the errors of Orbax's other tasks, which end after one that failed; return the hook that
    shows them.
    """
    hook = sys.unraisablehook

    def without_orbax(unraisable: Any) -> None:
        code = getattr(unraisable.object, "cr_code", None)
        of_orbax = code is not None and "orbax" in code.co_filename
        if not (of_orbax or str(unraisable.exc_value) == "Event loop is closed"):
            hook(unraisable)

    sys.unraisablehook = without_orbax
    return hook


def _lasting(action: str) -> contextlib.AbstractContextManager:
    return patience.lasting(action, here=jax.process_index() == 0)


def read(directory: Path, abstract: Any, step: int | None = None) -> tuple[int, Any, dict]:
    """Read a step (default: the latest) of a run that may continue: number, arrays, meta."""
    everywhere = sharding.replicated(sharding.make_mesh())
    with contextlib.closing(Checkpoints(directory, read_only=True)) as checkpoints:
        step = checkpoints.latest_step() if step is None else step
        assert step is not None
        arrays = checkpoints.restore(step, abstract_state(abstract, everywhere))
        return step, arrays, checkpoints.meta(step)


def abstract_state(state: Any, place: jax.sharding.Sharding) -> Any:
    """Return a state's shapes and types, all with one sharding, for `restore`."""
    shaped = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)  # noqa: E731
    return jax.tree.map(shaped, state)
