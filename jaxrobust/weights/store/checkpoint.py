"""Checkpoints of a run, written in the background by Orbax; only the latest one is kept.

Next to a step's arrays, `meta/metadata` holds JSON with the SHA-256 of each array and of the JSON
itself. For arrays that `fsdp` splits over several hosts, `meta/blocks_0`, `blocks_1`, ... hold the
SHA-256 of the blocks that each process wrote. All are checked whenever a checkpoint is read.
"""

import contextlib
import dataclasses
import errno
import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from jaxrobust.runtime.devices import sharding
from jaxrobust.runtime.files import whole
from jaxrobust.runtime.files.whole import DiskFull, disk_full
from jaxrobust.runtime.processes import hosts
from jaxrobust.runtime.text import patience
from jaxrobust.runtime.text.progress import say
from jaxrobust.weights.store import hashes

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
    host: dict[tuple[str, str], np.ndarray]  # what this process hashes, see `_on_host`


class Checkpoints:
    """Saves arrays and JSON under `directory/<step>`; a new step replaces the previous one.

    A step gets its number only when it is complete, and only then the previous one is removed, so a
    kill at any moment leaves one to continue from. With `keep_all` every step stays.
    """

    def __init__(self, directory: Path, *, read_only: bool = False, keep_all: bool = False) -> None:
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.LatestN(None if keep_all else 1),
            cleanup_tmp_directories=not read_only,  # they may belong to a run that continues
            read_only=read_only,
        )
        handlers = {"arrays": ocp.StandardCheckpointHandler(), "meta": _MetaHandler()}
        self.directory = directory.absolute()  # Orbax refuses relative paths
        self._size = 0  # bytes written
        saved = steps(self.directory)
        last = max(filter(self._whole, saved), default=None)
        if saved and saved[-1] != last:  # not ours, but Orbax would take it
            raise ValueError(
                f"{self.directory / str(saved[-1])} is not a complete checkpoint: move it away, "
                f"and the same command continues at {f'step {last}' if last else 'the start'}"
            )
        if not (read_only or keep_all) and jax.process_index() == 0:
            for step in saved[:-1]:  # a kill interrupted its removal
                shutil.rmtree(self.directory / str(step))
        self._manager = ocp.CheckpointManager(
            self.directory, options=options, item_handlers=handlers
        )

    def latest_step(self) -> int | None:
        """Return the newest checkpoint, complete after `wait`; None if there is none.

        Answers from memory: another host may see an outdated listing of a shared folder.
        """
        return self._manager.latest_step()

    def _whole(self, step: int) -> bool:
        return all((self.directory / str(step) / item).is_dir() for item in ("arrays", "meta"))

    def save(self, step: int, arrays: Any, meta: dict) -> None:
        """Start writing `arrays` and `meta` (JSON); an existing step stays."""
        self.wait()
        self._size = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
        if step != self.latest_step():
            # A copy: the next step overwrites the arrays, which the thread still has to hash.
            meta_and_host = _Meta(meta, _on_host(arrays))
            kinds = {"arrays": ocp.args.StandardSave(arrays), "meta": meta_and_host}
            with self._explained(), _lasting(f"writing the checkpoint of step {step}"):
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
            saved = self._manager.item_metadata(step)["arrays"].tree["params"]
        self._same_network(step, saved, abstract)
        items = ocp.args.Composite(arrays=ocp.args.StandardRestore(abstract))
        with _lasting(f"reading the checkpoint of step {step}"), self._readable(step):
            arrays = self._manager.restore(step, args=items)["arrays"]
        leaves, bad = _by_name(arrays), []
        sizes: dict[tuple[str, str], int] = {}  # of the blocks to check
        for (name, index), sha256 in expected.items():
            if name in leaves and (block := _block(leaves[name], index)) is not None:
                sizes[name, index] = block.size
                bad += [name] if hashes.array_sha256(block) != sha256 else []
        if files:  # each process holds some of the blocks, and all must stop
            findings = hosts.everyone((bad, sizes))
            bad = [name for names, _ in findings for name in names]
            sizes = {key: size for _, of_process in findings for key, size in of_process.items()}
        if bad:
            raise self._damaged(step, f"{bad[0]} has another sha256 than when it was saved")
        compared = Counter[str]()
        for (name, _), size in sizes.items():
            compared[name] += size
        if unknown := sum(compared[name] < leaf.size for name, leaf in leaves.items()):
            say(
                f"{self.directory / str(step)} has no hashes of {unknown} of its arrays that "
                "these devices can compare: whether they are damaged is unknown"
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
            for step in steps(self.directory):
                gone = self.directory / f"{step}.orbax-checkpoint-tmp"  # removed at the next start
                (self.directory / str(step)).rename(gone)
                shutil.rmtree(gone)
        multihost_utils.sync_global_devices("cleared")
        self._manager.reload()

    def wait(self) -> None:
        """Wait until everything is on disk; raise the error of a failed write."""
        with self._explained(), _lasting("writing a checkpoint"):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Stop the background threads."""
        self._manager.close()

    def _read_meta(self, step: int, name: str = "metadata") -> dict[str, Any]:
        with self._readable(step):
            meta = dict(json.loads((self.directory / str(step) / "meta" / name).read_text()))
        seal = meta.pop(_SEAL, None)
        if (seal or _ARRAYS in meta) and hashes.config_sha256(meta) != seal:
            raise self._damaged(step, f"meta/{name} has another sha256 than when it was saved")
        return meta

    @contextlib.contextmanager
    def _readable(self, step: int) -> Iterator[None]:
        """Turn any error caused by damaged files into one sentence."""
        # When a read fails, Orbax's other reads end later, each with a traceback on stderr. The
        # hook that hides these therefore stays after a damaged read, and only then.
        hook, is_damaged = sys.unraisablehook, False

        def without_reads(unraisable: Any) -> None:
            code = getattr(unraisable.object, "cr_code", None)
            of_orbax = code is not None and "orbax" in code.co_filename
            if not (of_orbax or str(unraisable.exc_value) == "Event loop is closed"):
                hook(unraisable)

        sys.unraisablehook = without_reads
        try:
            yield
        except (MemoryError, PermissionError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:
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
        """Turn a full disk, however deeply it was detected, into one sentence."""
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
                "differ); use its own config, or another folder:\n  " + "\n  ".join(lines)
            )


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


def _by_name(arrays: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(arrays)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in leaves}


def _on_host(arrays: Any) -> dict[tuple[str, str], np.ndarray]:
    """Copy what this process must hash, by name and index."""
    # Arrays that a process holds in full are hashed by the first process, with the index "". If
    # `fsdp` splits an array over several hosts, each process hashes its blocks.
    leaves = _by_name(arrays)
    copies: dict[tuple[str, str], np.ndarray] = {}
    for leaf in leaves.values():
        if isinstance(leaf, jax.Array) and jax.process_index() == 0:
            leaf.copy_to_host_async()  # all at once
    for name, leaf in leaves.items():
        shards = {str(s.index): s for s in getattr(leaf, "addressable_shards", ())}
        if sum(s.data.size for s in shards.values()) < leaf.size and shards:
            written = [shard for shard in shards.values() if shard.replica_id == 0]
            copies |= {(name, _text(s.index, leaf.shape)): np.array(s.data) for s in written}
        elif jax.process_index() == 0:
            copies[name, ""] = np.array(_block(leaf))
    return copies


def _text(index: Sequence[slice], shape: Sequence[int]) -> str:
    ends = (axis.indices(size) for axis, size in zip(index, shape, strict=True))
    return ",".join(f"{start}:{stop}" for start, stop, _ in ends)


def _block(array: Any, index: str = "") -> np.ndarray | None:
    """Join a block of an array, such as "0:8,16:32", from this process's devices."""
    # Without an index it is the full array. None: a part of it is on another host.
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array.addressable_data(0))  # equal on every device
    if not index and getattr(array, "is_fully_addressable", True):
        return np.asarray(array)
    axes = index.split(",") if index else [f"0:{size}" for size in array.shape]
    ends = [tuple(map(int, axis.split(":"))) for axis in axes]
    block, filled = np.empty([stop - start for start, stop in ends], array.dtype), 0
    for shard in {str(shard.index): shard for shard in array.addressable_shards}.values():
        source, target = [], []
        for axis, size, (start, stop) in zip(shard.index, array.shape, ends, strict=True):
            first, last, _ = axis.indices(size)
            low = max(start, first)
            high = max(low, min(stop, last))
            source.append(slice(low - first, high - first))
            target.append(slice(low - start, high - start))
        block[tuple(target)] = np.asarray(shard.data)[tuple(source)]
        filled += block[tuple(target)].size
    return block if filled == block.size else None


def steps(directory: Path) -> list[int]:
    """List the steps with a folder in a checkpoint directory, in order."""
    folders = [path.name for path in directory.glob("*") if path.is_dir()]
    return sorted(int(name) for name in folders if re.fullmatch("0|[1-9][0-9]*", name))


def abstract_state(state: Any, place: jax.sharding.Sharding) -> Any:
    """Return a state's shapes and types, all with one sharding, for `restore`."""
    shaped = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)  # noqa: E731
    return jax.tree.map(shaped, state)
