"""Runs on the shipped digits that take a moment, and what happens to them."""

import contextlib
import io
import json
import os
import signal
import tempfile
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxrobust.config import base, plain
from jaxrobust.training import build
from jaxrobust.training.run import run as training_run
from jaxrobust.training.run import splits, stopping
from jaxrobust.training.update import step
from jaxrobust.weights.store import checkpoint


def tiny(**changes) -> ConfigDict:
    """Digits, a network that compiles in a moment, 2 clean and 3 adversarial epochs of 4 steps."""
    config = base().unlock()
    config.model.update(name="convnext_n", num_classes=10, image_size=8)
    config.model.in_channels = 1
    config.model.options = ConfigDict({"stem_strides": (1,), "depths": (1,), "dims": (8,)})
    config.data.update(
        name="digits",
        train_split="train[:256]",
        selection_split="train[256:320]",
        test_split="test[:80]",
        augmentation="crop",
    )
    config.pretrain.update(epochs=2, batch_size=64, warmup_epochs=1, ema_decay=0.5, lr=0.01)
    config.train.update(epochs=3, batch_size=64, warmup_epochs=1, ema_decay=0.5, lr=0.01)
    config.attack.update(epsilon=0.1, steps=2)
    config.evaluation.update(batch_size=32, steps=2)
    config.test.update(batch_size=32, steps=3)
    config.log.every_steps = 3
    for key, value in changes.items():
        target, _, name = key.rpartition("__")
        setattr(config[target] if target else config, name, value)
    return config.lock()


_FILE = """
import json
from ml_collections import ConfigDict

def get_config():
    config = ConfigDict(json.loads({text!r}))
    config.phases = tuple(config.phases)
    for name in config.phases:
        config[name].lr_steps = config[name].bn_momentum = ()
    return config
"""


def write_config(path: Path, config) -> None:
    """A config as the file that a command reads."""
    path.write_text(_FILE.format(text=json.dumps(plain(config))))


def quiet_run(config, workdir, **how) -> str:
    """What a run prints."""
    said = io.StringIO()
    with (
        contextlib.redirect_stderr(said),
        contextlib.redirect_stdout(said),
        jax.numpy_dtype_promotion("standard"),
    ):
        training_run.run(config, workdir, **how)
    return said.getvalue()


def run_of_class(test, config, **how) -> tuple[Path, str]:
    """The workdir of a run that all tests of a class look at, and what it prints."""
    directory = tempfile.TemporaryDirectory()
    test.addClassCleanup(directory.cleanup)
    workdir = Path(directory.name) / "run"
    return workdir, quiet_run(config, workdir, **how)


def final_state(workdir: Path, config, phase="train"):
    with jax.numpy_dtype_promotion("standard"):
        built = build.phase(config, phase, 256)
        abstract = checkpoint.abstract_state(
            built.abstract_state, jax.sharding.SingleDeviceSharding(jax.devices()[0])
        )
    with contextlib.closing(checkpoint.Checkpoints(workdir / phase / "latest")) as checkpoints:
        step = checkpoints.latest_step()
        return checkpoints.restore(step, abstract), checkpoints.meta(step)


@contextlib.contextmanager
def _counting(after: int, then):
    """Calls `then()` when the loop asks for the batch after `after` steps of the whole run."""
    original, seen = splits.device_batch, [0]

    def counted(mesh, batch):
        seen[0] += 1
        if seen[0] == after:
            then()
        return original(mesh, batch)

    with mock.patch.object(splits, "device_batch", counted):
        yield


def stop_after(after: int, run, said: str = "") -> None:
    with _counting(after, lambda: os.kill(os.getpid(), signal.SIGINT)):
        try:
            run()
        except stopping.Interrupted as error:
            assert "run the same command to continue" in str(error)
            assert said in str(error), error
        else:
            raise AssertionError("was not interrupted")


@contextlib.contextmanager
def poisoned(steps, *, scales=(1.0,)):
    """The gradient after these numbers of steps is NaN, at these scales of the learning rate."""
    real = step.train_step

    def train_step(state, batch, control, *, parts):
        bad = jnp.isin(state.step, jnp.asarray(steps))
        bad &= jnp.isin(control.lr_scale, jnp.asarray(scales, jnp.float32))

        def spoiled(*arguments):
            grads, others = parts.device_gradients(*arguments)
            return jax.tree.map(lambda g: jnp.where(bad, jnp.nan, g), grads), others

        return real(state, batch, control, parts=parts._replace(device_gradients=spoiled))

    with mock.patch.object(step, "train_step", train_step):
        yield


def one_phase(**changes):
    """Three adversarial epochs of four steps."""
    return tiny(pretrain__epochs=0, log__every_steps=1, **changes)
