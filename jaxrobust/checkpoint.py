"""Checkpoints of a run: the latest and the best, written in the background by Orbax."""

import errno
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers


class Checkpoints:
    """Saves and restores the states of one phase under `directory/<step>`.

    Kept are the latest one, and the best one by `metric` (higher is better).
    """

    def __init__(self, directory: Path, *, metric: str):
        def score(metrics: dict[str, float]) -> float:
            return metrics[metric]

        policies = checkpoint_managers
        keep = policies.AnyPreservationPolicy(
            [
                policies.LatestN(1),
                policies.BestN(get_metric_fn=score, n=1, keep_checkpoints_without_metrics=False),
            ]
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep, best_fn=score, cleanup_tmp_directories=True
        )
        self.directory = directory.absolute()  # Orbax refuses relative paths
        handlers = {"state": ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(
            self.directory, options=options, item_handlers=handlers
        )

    def latest_step(self) -> int | None:
        """The newest complete checkpoint, None where there is none."""
        return self._manager.latest_step()

    def best_step(self) -> int:
        """The checkpoint with the highest metric; there must be one that was evaluated."""
        step = self._manager.best_step()
        assert step is not None, f"no evaluated checkpoint under {self.directory}"
        return step

    def save(
        self, step: int, state: Any, meta: dict, metrics: dict[str, float] | None = None
    ) -> None:
        """Starts writing `state` (arrays) and `meta` (JSON); a step that exists is replaced.

        Raises:
          OSError: ENOSPC, with what to do; also for an earlier write that failed meanwhile.
        """
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        with self._explained():
            self._manager.wait_until_finished()
            if step in self._manager.all_steps():
                self._manager.delete(step)
            self._manager.save(step, args=items, metrics=metrics, force=True)

    def restore(self, step: int, abstract: Any) -> tuple[Any, dict]:
        """The state with the shapes, types and shardings of `abstract`, and the meta data.

        Raises:
          ValueError: the checkpoint is that of another network.
        """
        self._same_network(step, abstract)
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract), meta=ocp.args.JsonRestore()
        )
        restored = self._manager.restore(step, args=items)
        return restored["state"], restored["meta"]

    def wait(self) -> None:
        """Returns when everything is on disk; raises what a write raised."""
        with self._explained():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Ends the background threads."""
        self._manager.close()

    def _explained(self):
        return _Explained(self)

    def _same_network(self, step: int, abstract: Any) -> None:
        def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
            return {name: tuple(leaf.shape) for name, leaf in tree.items()}

        saved = shapes(self._manager.item_metadata(step)["state"].tree["params"])
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


class _Explained:
    """Turns a full disk, however deep it was noticed, into one sentence."""

    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints = checkpoints

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if error is not None and _disk_full(error):
            last = self._checkpoints.latest_step()
            raise OSError(
                errno.ENOSPC,
                f"the disk is full: a checkpoint under {self._checkpoints.directory} could not be "
                f"written. The last good one is step {last}. Free some space and run the same "
                "command again: it continues there",
            ) from error


def _disk_full(error: BaseException | None) -> bool:
    while error is not None:
        text = str(error)
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in text:
            return True
        error = error.__cause__ or error.__context__
    return False


def abstract_state(state: Any, sharding: jax.sharding.Sharding) -> Any:
    """Shapes and types of a state, all under one sharding: what `restore` wants."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state
    )
