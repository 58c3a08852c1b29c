"""The command of evaluation in this process, and a run for it."""

import contextlib
import io
import json
import tempfile
import unittest
from pathlib import Path

import grain  # noqa: F401  # defines flags, which `flagsaver` must not see for the first time
import jax
import numpy as np
from absl.testing import flagsaver

from jaxrobust import data
from jaxrobust.commands import evaluate
from jaxrobust.config import VERSION, network_of
from jaxrobust.types import Weights
from jaxrobust.weights.store.checkpoint import Checkpoints
from tests.support import runs as training


def call(**given) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command with these flags."""
    out, said, code = io.StringIO(), io.StringIO(), 0
    with (
        flagsaver.flagsaver(**given),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(said),
        jax.numpy_dtype_promotion("standard"),
    ):
        try:
            evaluate.main(["evaluate"])
        except SystemExit as stopped:
            code = stopped.code
    return code, out.getvalue(), said.getvalue()


def fitted(config) -> Weights:
    """Random weights with a head of ridge regression: most digits are right, few robust."""
    source = data.open_source("digits", "train")
    (batch,) = data.evaluation_batches(source, batch_size=len(source), image_size=8)
    params, stats = jax.jit(network_of(config).init)(jax.random.key(7))
    width = len(params["head.norm.scale"])
    config = config.copy_and_resolve_references()
    config.model.num_classes = width
    head = {"head.fc.kernel": np.eye(width, dtype=np.float32), "head.fc.bias": np.zeros(width)}
    features, _ = jax.jit(network_of(config).apply)(
        params | head, stats, batch.images / np.float32(255)
    )
    design = np.concatenate([features, np.ones((len(features), 1))], axis=1)
    ridge = design.T @ design + 0.01 * np.eye(width + 1)
    solved = np.linalg.solve(ridge, design.T @ np.eye(10)[batch.labels]).astype(np.float32)
    return Weights(params | {"head.fc.kernel": solved[:-1], "head.fc.bias": solved[-1]}, stats)


def trained(workdir: Path, *, pretrained: bool = True) -> None:
    """A run with weights of both phases, or of the last alone; those are fit for attacks."""
    config = training.tiny(
        pretrain__epochs=1, pretrain__warmup_epochs=0, train__epochs=0, train__warmup_epochs=0
    )
    config.unlock().model.options.update(dims=(32,), gamma_init=5.0)
    if pretrained:
        training.quiet_run(config, workdir)
    else:
        workdir.mkdir()
        own = {"version": VERSION} | json.loads(config.to_json())
        (workdir / "config.json").write_text(json.dumps(own))
    with contextlib.closing(Checkpoints(workdir / "train" / "best")) as best:
        best.save(3, fitted(config), {})  # as if a second phase had just begun
        best.wait()


def run_for(tests: type[unittest.TestCase], *, pretrained: bool = True) -> Path:
    """A run of `trained`, which goes when the tests of this class are over."""
    workdir = Path(tests.enterClassContext(tempfile.TemporaryDirectory())) / "run"
    trained(workdir, pretrained=pretrained)
    return workdir
