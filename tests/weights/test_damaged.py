"""Damaged checkpoints: whatever happens to a file, its arrays come back as saved or not at all.

Before hashes stood next to arrays, a checkpoint with 400 of 263,392 bytes changed was evaluated.
"""

import contextlib
import functools
import io
import json
import os
import shutil
import tempfile
import unittest
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import jax
import numpy as np
from absl.testing import parameterized
from safetensors.numpy import load_file, save_file

import jaxrobust
from jaxrobust.config import VERSION, network_of
from jaxrobust.evaluation.questions import target
from jaxrobust.papers.networks import network_sample
from jaxrobust.publish import export_torch
from jaxrobust.training import build
from jaxrobust.training.update.step import TrainState
from jaxrobust.types import Weights
from jaxrobust.weights import start as start_weights
from jaxrobust.weights.store import checkpoint, hashes
from jaxrobust.weights.store.checkpoint import Checkpoints
from jaxrobust.weights.trained import kept, runs
from tests.support import sweeps
from tests.support.runs import tiny


def flip(path: Path) -> None:
    """Change 8 bytes in the middle."""
    data = bytearray(path.read_bytes())
    half = len(data) // 2
    data[half : half + 8] = bytes(byte ^ 0x15 for byte in data[half : half + 8])
    path.write_bytes(data)


def flip_all(path: Path) -> None:
    path.write_bytes(bytes(byte ^ 0x15 for byte in path.read_bytes()))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garbage(path: Path) -> None:
    path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size))


def swap(path: Path) -> None:
    """Let two arrays of one shape change places."""
    arrays, names = load_file(path), {}
    for name, array in sorted(arrays.items()):
        names.setdefault((array.shape, array.tobytes() == bytes(array.nbytes)), name)
    one, other = next(
        (a, b)
        for a in names.values()
        for b in names.values()
        if a < b and arrays[a].shape == arrays[b].shape
    )
    save_file(arrays | {one: arrays[other], other: arrays[one]}, path)


DAMAGES = (flip, flip_all, cut, garbage, Path.unlink)


def data_files(step: Path) -> list[Path]:
    """Find the files of arrays, the largest first."""
    files = (step / "arrays").rglob("d/*")
    return sorted((path for path in files if path.is_file()), key=lambda p: -p.stat().st_size)


def metadata(step: Path) -> Path:
    return step / "meta" / "metadata"


class Original(NamedTuple):
    """The workdir of a run that did not train: a config, and checkpoints of each kind."""

    workdir: Path
    weights: Weights
    state: TrainState


@functools.cache
def original() -> Original:
    """Write the run that the tests of all classes copy."""
    folder = tempfile.TemporaryDirectory()
    unittest.addModuleCleanup(folder.cleanup)
    workdir, config = Path(folder.name) / "run", tiny()
    workdir.mkdir()
    plain = {"version": VERSION} | json.loads(config.to_json())
    (workdir / "config.json").write_text(json.dumps(plain))
    weights = Weights(*jax.jit(network_of(config).init)(jax.random.key(0)))
    with jax.numpy_dtype_promotion("standard"):
        state = build.phase(config, "train", 256).state_of(jax.random.key(0), *weights)
    for phase in ("pretrain", "train"):
        for kind, saved in (("best", weights), ("epochs", weights), ("latest", state)):
            with contextlib.closing(Checkpoints(workdir / phase / kind)) as files:
                files.save(4, saved, {"examples_consumed": 256, "robust": 0.5})
                files.wait()
        kept.keep(workdir, phase, 4, kept.Kept(*weights, *weights), steps_per_epoch=4)
    chosen = {"phase": "train", "step": 4, "epoch": 1.0, "weights": "ema", "image_size": 8}
    chosen["weights_sha256"] = hashes.weights_sha256(*weights)
    choice = {"schema": kept.SCHEMA, "chosen": chosen, "candidates": []}
    (workdir / kept.SELECTION).write_text(json.dumps(choice))
    return Original(workdir, weights, state)


class RunOfCheckpoints(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.workdir = Path(self.create_tempdir()) / "run"
        shutil.copytree(original().workdir, self.workdir)


def _resumed(workdir: Path, abstract) -> None:
    with contextlib.closing(Checkpoints(workdir / "train" / "latest")) as files:
        files.meta(4)
        files.restore(4, abstract)


def _started(workdir: Path) -> None:
    start_weights.of_config(tiny(init__weights=str(workdir)))


def _exported(workdir: Path, **which) -> None:
    which = {"workdir": workdir, "layout": "jaxrobust", "out": workdir / "export"} | which
    export_torch.read(export_torch.ExportSettings(**which))


def _compared(workdir: Path) -> None:
    network_sample.epochs(workdir, target.of_run(workdir), "train")


READERS = {
    "evaluate": ("best", runs.run_weights),
    "init.weights": ("best", _started),
    "load": ("best", lambda workdir: jaxrobust.load(workdir, tell=lambda line: None)),
    "export": ("best", _exported),
    "figures": ("epochs", _compared),
    "export --which raw": ("latest", partial(_exported, which="raw")),
    "select": ("kept", lambda workdir: kept.read(workdir, "train", 4)),
    "--selected": ("kept", lambda workdir: kept.selected_weights(workdir, kept.selected(workdir))),
    "export --selected": ("kept", partial(_exported, selected=True)),
}


class ReadersTest(RunOfCheckpoints):
    @parameterized.parameters(*sorted([*READERS, "resume"]))
    def test_damaged_arrays_are_a_sentence(self, reader):
        abstract = jax.eval_shape(lambda: original().state)
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        resume = partial(_resumed, abstract=checkpoint.abstract_state(abstract, place))
        kind, read = READERS.get(reader, ("latest", resume))
        for damage in DAMAGES:
            with self.subTest(damage.__name__):
                shutil.rmtree(self.workdir)
                shutil.copytree(original().workdir, self.workdir)
                read(self.workdir)
                for path in data_files(self.workdir / "train" / kind / "4"):
                    damage(path)
                said = f"train/{kind}/4 is damaged .*; restore .* or "
                with self.assertRaisesRegex(ValueError, said):
                    read(self.workdir)


class EveryFileTest(RunOfCheckpoints):
    @sweeps.rows(*DAMAGES)
    def test_arrays_are_as_saved_or_refused(self, damage):
        step = self.workdir / "train" / "best" / "4"
        names = [path.relative_to(step) for path in sorted(step.rglob("*")) if path.is_file()]
        refused = 0
        for name in names:
            content = (step / name).read_bytes()
            damage(step / name)
            try:
                _, read = runs.run_weights(self.workdir)
            except ValueError as error:
                refused += 1
                self.assertRegex(str(error), "train/best/4 is damaged .*another phase .pretrain.")
                self.assertNotIn("\n", str(error))
            else:
                for mine, saved in zip(read, original().weights, strict=True):
                    jax.tree.map(np.testing.assert_array_equal, mine, saved)
            (step / name).write_bytes(content)
        self.assertGreater(refused, 2)

    def test_a_changed_number_beside_the_arrays(self):
        path = metadata(self.workdir / "train" / "latest" / "4")
        path.write_text(path.read_text().replace(": 256", ": 257"))
        with (
            contextlib.closing(Checkpoints(self.workdir / "train" / "latest")) as files,
            self.assertRaisesRegex(
                ValueError, "4 is damaged .meta/metadata has a different sha256"
            ),
        ):
            files.meta(4)

    def test_arrays_of_equal_shapes_that_changed_places(self):
        best = self.workdir / "train" / "best"
        shutil.rmtree(best)
        params, stats = original().weights
        names = sorted(params)
        shapes = {name: params[name].shape for name in names}
        one, other = next((a, b) for a in names for b in names if a < b and shapes[a] == shapes[b])
        swapped = params | {one: params[other] + 1, other: params[one]}
        with contextlib.closing(Checkpoints(best)) as files:
            files.save(4, Weights(swapped, stats), {})
            files.wait()
        own = metadata(original().workdir / "train" / "best" / "4")
        shutil.copy(own, metadata(best / "4"))
        with self.assertRaisesRegex(ValueError, "4 is damaged .*has a different sha256"):
            runs.run_weights(self.workdir)

    @parameterized.parameters("arrays_sha256", "meta_sha256")
    def test_hashes_that_were_edited_or_removed(self, key):
        path = metadata(self.workdir / "train" / "best" / "4")
        meta = json.loads(path.read_text())
        edited = dict.fromkeys(meta[key], "0" * 64) if key == "arrays_sha256" else "0" * 64
        for changed in (meta | {key: edited}, {k: v for k, v in meta.items() if k != key}):
            path.write_text(json.dumps(changed))
            with self.assertRaisesRegex(ValueError, "train/best/4 is damaged"):
                runs.run_weights(self.workdir)


class RemedyTest(RunOfCheckpoints):
    @sweeps.rows(
        ("kept", (4, 8), 8, r"the previous step \(4\) or the latest checkpoint \(train/latest/4\)"),
        ("kept", (4, 8), 4, r"a later step \(8\) or .*the best weights \(train/best/4\)"),
        (
            "best",
            (4,),
            4,
            r"latest checkpoint, which .* evaluates .* or another phase \(pretrain\)",
        ),
        ("latest", (4,), 4, "the best weights .* or the start of the phase, where training begins"),
    )
    def test_what_else_the_run_has(self, kind, steps, damaged, remedy):
        folder = self.workdir / "train" / kind
        for step in steps:
            if not (folder / str(step)).exists():
                shutil.copytree(folder / "4", folder / str(step))
        cut(metadata(folder / str(damaged)))
        with (
            contextlib.closing(Checkpoints(folder, read_only=True)) as files,
            self.assertRaisesRegex(ValueError, f"{kind}/{damaged} is damaged .*{remedy}"),
        ):
            files.meta(damaged)

    def test_a_run_that_has_nothing_else(self):
        for path in self.workdir.rglob("*"):
            if path.name in ("latest", "epochs", "kept", "pretrain"):
                shutil.rmtree(path, ignore_errors=True)
        cut(metadata(self.workdir / "train" / "best" / "4"))
        with self.assertRaisesRegex(ValueError, "from a copy, or train again in another folder"):
            runs.run_weights(self.workdir)


class OldTest(RunOfCheckpoints):
    """Checkpoints of before have no hashes; a run's records may still have theirs."""

    def setUp(self):
        super().setUp()
        path = metadata(self.workdir / "train" / "best" / "4")
        path.write_text('{"robust": 0.5}')
        self.said = self.enter_context(contextlib.redirect_stderr(io.StringIO()))

    def test_they_are_read_and_what_is_unknown_is_said(self):
        _, read = runs.run_weights(self.workdir)
        self.assertEqual(hashes.weights_sha256(*read), hashes.weights_sha256(*original().weights))
        self.assertIn("would go unnoticed", self.said.getvalue())

    def test_the_record_of_its_test_is_compared(self):
        row = {"weights": "train, step 4, ema", "weights_sha256": "0" * 64}
        (self.workdir / "results.jsonl").write_text(json.dumps(row) + "\n")
        with self.assertRaisesRegex(
            ValueError, "best/4 does not hold the weights that .*results.jsonl"
        ):
            runs.run_weights(self.workdir)


class FilesTest(RunOfCheckpoints):
    """Exports, each read by `jaxrobust.load` after its array data has changed."""

    def setUp(self):
        super().setUp()
        self.enter_context(contextlib.redirect_stderr(io.StringIO()))
        cache = {"XDG_CACHE_HOME": self.create_tempdir().full_path}
        self.enter_context(mock.patch.dict(os.environ, cache))

    @parameterized.parameters("jaxrobust", "hub", "module")
    def test_they_are_refused(self, layout):
        whole, out = (self.workdir.with_name(name) for name in ("whole", "exported"))
        settings = {"workdir": self.workdir, "layout": layout, "out": whole, "nocertificate": True}
        with contextlib.redirect_stdout(io.StringIO()):
            export_torch.export(export_torch.ExportSettings(**settings))
        alone = layout == "module"  # a file, which has no hash of its arrays
        model = {"model": "convnext_n", "image_size": 8} if alone else {}
        options = dict(tiny().model.options) if alone else {}
        for damage in (flip, cut, *[swap] * (not alone)):
            with self.subTest(damage.__name__):
                shutil.rmtree(out, ignore_errors=True)
                shutil.copytree(whole, out)
                (file,) = [p for p in out.iterdir() if p.suffix in (".safetensors", ".pt")]
                source = file if alone else out
                read = partial(jaxrobust.load, source, tell=lambda line: None, **model, **options)
                read()
                damage(file)
                with self.assertRaisesRegex(ValueError, "download (it|both) again"):
                    read()
