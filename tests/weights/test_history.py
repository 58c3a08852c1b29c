"""What trained and chose weights follows them, whichever way they go from run to run.

Over one `init.weights`, a training on the test images was forgotten: `on_evaluated_images: false`.
"""

import contextlib
import io
import json
import os
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import jax
from absl.testing import parameterized
from safetensors.numpy import save_file

from jaxrobust.config import VERSION, network_of
from jaxrobust.evaluation.questions import target
from jaxrobust.evaluation.records import of_weights
from jaxrobust.publish import export_torch
from jaxrobust.types import Weights
from jaxrobust.weights import start as start_weights
from jaxrobust.weights.store import hashes
from jaxrobust.weights.store.checkpoint import Checkpoints
from jaxrobust.weights.trained import history, kept
from tests.support.runs import tiny

TEST = {"dataset": "digits", "split": "test"}
OWN = 2 + 3 * (1 + 2)  # passes of `tiny`


def begin(workdir: Path, weights: Weights | None = None, **changes) -> Path:
    """Do what a run does at its start and at its end, but train."""
    config = tiny(**changes)
    workdir.mkdir(parents=True)
    own = {"version": VERSION} | json.loads(config.to_json())
    (workdir / "config.json").write_text(json.dumps(own))
    start = start_weights.of_config(config, workdir)
    if start:
        (workdir / history.START).write_text(json.dumps(start[1]))
        weights = Weights(start[0].params, start[0].stats)
    assert weights is not None
    with contextlib.closing(Checkpoints(workdir / "train" / "best")) as files:
        files.save(12, weights, {"robust": 0.5})
        files.wait()
    kept.keep(workdir, "train", 12, kept.Kept(*weights, *weights), steps_per_epoch=4)
    return workdir


def facts(workdir: Path) -> dict:
    found = of_weights.training(history.of_run(workdir, "train"), **TEST)
    assert found is not None
    return dict(found)


def exported(run: Path, layout: str, **which) -> Path:
    out = run.with_name(f"{run.name}-{layout}-{len(which)}")
    settings = export_torch.ExportSettings(
        workdir=run, layout=layout, out=out, nocertificate=True, **which
    )
    with contextlib.redirect_stdout(io.StringIO()):
        export_torch.export(settings)
    return out


def moved(run: Path) -> Path:
    return Path(shutil.move(run, run.with_name("moved")))


def chain(run: Path) -> Path:
    """A run that trained on other images comes between."""
    return begin(run.with_name("between"), init__weights=str(run))


def selected(run: Path) -> Path:
    """Weights that a choice took, which says on which images."""
    _, both = kept.read(run, "train", 12)
    chosen = {"phase": "train", "step": 12, "epoch": 3.0, "weights": "raw", "image_size": 8}
    chosen["weights_sha256"] = hashes.weights_sha256(*both.of("raw"))
    choice = {"schema": kept.SCHEMA, "chosen": chosen, "candidates": [], "attack": {"name": "a"}}
    choice |= {"dataset": "digits", "split": "test[5:]"}
    (run / kept.SELECTION).write_text(json.dumps(choice))
    return exported(run, "jaxrobust", selected=True)


WAYS = {
    "a run": lambda run: run,
    "a run that was moved": moved,
    "a folder of ours": lambda run: exported(run, "jaxrobust"),
    "a folder of the hub": lambda run: exported(run, "hub"),
    "two runs": chain,
    "a folder of a run from a run": lambda run: exported(chain(run), "jaxrobust"),
    "a chosen epoch": selected,
}


class WaysTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        params, stats = jax.jit(network_of(tiny()).init)(jax.random.key(0))
        cls.weights = Weights(params, stats)

    def setUp(self):
        super().setUp()
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.folder = Path(directory.name)
        cache = {"XDG_CACHE_HOME": str(self.folder / "cache")}
        self.enter_context(mock.patch.dict(os.environ, cache))
        self.enter_context(contextlib.redirect_stderr(io.StringIO()))

    def next_run(self, weights: Path) -> dict:
        """Start a run from weights, remove all that was before it, and read its facts."""
        run = begin(self.folder / "next" / "run", init__weights=str(weights))
        for path in [p for p in self.folder.iterdir() if p.is_dir() and p.name != "next"]:
            shutil.rmtree(path)
        return facts(run)

    @parameterized.parameters(
        *((way, {"data__train_split": "test"}) for way in sorted(WAYS)),
        ("a run", {"data__extra": "digits", "data__extra_split": "test[:9]"}),
        ("a run", {"pretrain__changes": {"data": {"train_split": "test"}}}),
        ("a folder of ours", {"data__selection_split": "test"}),
        ("two runs", {"data__selection_split": "test"}),
        ("a folder of the hub", {}),
        ("a run", {}),
    )
    def test_facts_follow(self, way, changes):
        first = begin(self.folder / "first", self.weights, **changes)
        said = self.next_run(WAYS[way](first))
        runs = 3 if "two" in way or "from" in way else 2
        self.assertEqual(said["passes"], runs * OWN)
        self.assertLen(said["phases"], runs * 2)
        on_test = any(value in ("test", "test[:9]") for value in changes.values())
        on_test |= "pretrain__changes" in changes
        chosen = changes.get("data__selection_split") == "test" and way != "a chosen epoch"
        chosen |= way == "a chosen epoch"
        self.assertIs(
            said["on_evaluated_images"], on_test and "data__selection_split" not in changes
        )
        self.assertIs(said["selection"]["on_evaluated_images"], chosen)
        flags = of_weights.training_flags(said)
        self.assertEqual("training" in flags, said["on_evaluated_images"])
        self.assertEqual("selection" in flags, chosen)

    @parameterized.parameters("file", "old folder", "old start", "edited")
    def test_what_cannot_be_followed_is_unknown(self, what):
        first = begin(self.folder / "first", self.weights)
        weights = first
        if what == "file":
            weights = self.folder / "w.safetensors"
            save_file(jax.device_get(self.weights.params | self.weights.stats), weights)
        elif what in ("old folder", "edited"):
            weights = exported(first, "jaxrobust")
            config = json.loads((weights / "config.json").read_text())
            config["training"] = None if what == "old folder" else ["damaged"]
            (weights / "config.json").write_text(json.dumps(config))
        elif what == "old start":  # the run of before began from weights, and noted no facts
            weights = begin(self.folder / "old", init__weights=str(first))
            start = json.loads((weights / history.START).read_text())
            del start["training"]
            (weights / history.START).write_text(json.dumps(start))
        said = self.next_run(weights)
        self.assertIsNone(said["on_evaluated_images"])
        self.assertIsNone(said["selection"]["on_evaluated_images"])
        self.assertIsNone(said["passes"])

    def test_random_weights_that_an_older_version_normalised_are_known(self):
        run = begin(self.folder / "first", self.weights)
        (run / history.START).write_text('{"weights": null, "normalize": "half"}')
        self.assertIs(facts(run)["on_evaluated_images"], False)

    @parameterized.parameters("init.json", "data.json")
    def test_a_damaged_file_is_named(self, name):
        run = begin(self.folder / "first", self.weights)
        for text in ("{", "[1]"):
            (run / name).write_text(text)
            with self.assertRaisesRegex(ValueError, f"{name} is damaged .*; restore it"):
                facts(run)

    def test_an_exported_folder_is_evaluated_with_its_facts(self):
        first = begin(self.folder / "first", self.weights, data__train_split="test")
        subject = target.of_folder(exported(first, "jaxrobust"), None, None)
        said = of_weights.training(subject.history or [], **TEST)
        self.assertTrue(said["on_evaluated_images"])

    def test_moved_files_are_known_by_their_hash(self):
        run = history.of_config(tiny(data__name="npz:a.npz"), "train")
        for images in run["trained_on"]:
            images["files_sha256"] = "f" * 64
        on = {"dataset": "npz:b.npz", "split": "train[:5]"}
        for sha256, same in (("f" * 64, True), ("e" * 64, False), (None, False)):
            said = of_weights.training([run], **on, files_sha256=sha256)
            self.assertIs(said["on_evaluated_images"], same)

    def test_phases_that_do_not_lead_to_another_do_not_count(self):
        config = tiny(data__train_split="train").unlock()
        config.phases = ("pretrain", "other", "train")
        config.other = tiny(pretrain__changes={"data": {"train_split": "test"}}).pretrain
        for start, on_test in (("pretrain", False), (None, True)):
            config.train.start = start
            said = of_weights.training([history.of_config(config, "train")], **TEST)
            self.assertIs(said["on_evaluated_images"], on_test)
