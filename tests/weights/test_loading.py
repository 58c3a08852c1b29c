"""Networks with their weights, by a name or from a path, and what is said of them."""

import contextlib
import json
from unittest import mock

import jax
import numpy as np
import pytest
from absl.testing import parameterized
from safetensors.numpy import save, save_file

import jaxrobust
from jaxrobust import models
from jaxrobust.config import VERSION
from jaxrobust.models.published import LEADERBOARDS, PUBLISHED, Published
from jaxrobust.types import Weights
from jaxrobust.weights import imports
from jaxrobust.weights import load as loading
from jaxrobust.weights import start as start_weights
from jaxrobust.weights.fetch import remote_weights
from jaxrobust.weights.store import hashes, weights_folder
from jaxrobust.weights.store.checkpoint import Checkpoints
from jaxrobust.weights.trained import history
from tests.support import evaluations
from tests.support import runs as training
from tests.support.servers import ServedCase
from tests.support.stored import as_timm, weights

OPTIONS = {"stem_strides": (1,), "depths": (1,), "dims": (8,)}  # those of `training.tiny`
SIZES = {"num_classes": 10, "image_size": 8, "in_channels": 1}
NETWORK = {"architecture": "convnext_n", "options": {k: list(v) for k, v in OPTIONS.items()}}
KEY = "Somebody2026Tiny"


def small(**more) -> dict[str, np.ndarray]:
    """All weights of the network of `training.tiny`, under our names."""
    return weights("convnext_n", image_size=8, in_channels=1, **(OPTIONS | more))


def split(arrays):
    stats = {k: a for k, a in arrays.items() if k.startswith("normalize.")}
    return {k: a for k, a in arrays.items() if k not in stats}, stats


class Case(ServedCase):
    def setUp(self):
        super().setUp()
        self.said: list[str] = []
        self.enter_context(jax.numpy_dtype_promotion("standard"))

    def load(self, source, **how) -> loading.LoadedNetwork:
        return jaxrobust.load(source, tell=self.said.append, **how)

    def assert_same(self, found: loading.LoadedNetwork, arrays) -> None:
        ours = found.params | found.stats
        self.assertEqual(ours.keys(), arrays.keys())
        for key, array in arrays.items():
            np.testing.assert_array_equal(ours[key], array, err_msg=key)
        self.assertEqual(
            found.about["weights_sha256"], hashes.weights_sha256(*split(arrays)), "as records do"
        )


class PathTest(Case):
    @pytest.mark.slow
    def test_a_file_that_says_whose_it_is(self):
        file = self.folder / "mine.safetensors"
        save_file(small(), file, metadata=weights_folder.metadata("convnext_n", OPTIONS))
        found = self.load(file, image_size=8)
        self.assert_same(found, small())
        net = models.create("convnext_n", **SIZES, **OPTIONS)
        images = np.random.default_rng(0).random((2, 8, 8, 1), np.float32)
        ours, theirs = (n.apply(found.params, found.stats, images)[0] for n in (found.net, net))
        np.testing.assert_array_equal(ours, theirs)
        self.assertEqual(found.about["options"], NETWORK["options"])
        self.assertEqual({key: found.about[key] for key in SIZES}, SIZES)
        self.assertEqual(found.about["source"], "mine.safetensors")
        for key in ("preprocessing", "norm", "epsilon", "accuracies"):
            self.assertIsNone(found.about[key], key)
        half = self.load(file, image_size=8, dtype="bfloat16").net.apply
        logits, _ = half(found.params, found.stats, images)
        self.assertFalse(np.array_equal(logits, ours))

    def test_a_file_of_timms_names(self):
        file = self.folder / "timm.safetensors"
        save_file(as_timm(weights()), file)
        self.assert_same(self.load(file, model="convnext_n", image_size=16), weights())
        with self.assertRaisesRegex(ValueError, "does not name its network; give --model NAME"):
            self.load(file)
        with self.assertRaisesRegex(ValueError, "unknown model 'convnext'; did you mean"):
            self.load(file, model="convnext")

    def test_an_imported_folder(self):
        about = NETWORK | SIZES | {"preprocessing": "none", "norm": "l2", "epsilon": 0.5}
        weights_folder.write(self.folder / "imported", *split(small()), about)
        found = self.load(self.folder / "imported")
        self.assert_same(found, small())
        self.assertEqual({key: found.about[key] for key in about}, about)
        self.assertIsNone(self.load(self.folder / "imported", image_size=16).about["preprocessing"])
        with self.assertRaisesRegex(ValueError, "holds one set of weights; leave --which out"):
            self.load(self.folder / "imported", which="raw")

    def test_an_imported_folder_that_says_which_weights_it_holds(self):
        about = NETWORK | SIZES | {"which": "raw"}
        weights_folder.write(self.folder / "imported", *split(small()), about)
        self.assert_same(self.load(self.folder / "imported", which="raw"), small())
        with self.assertRaisesRegex(ValueError, "holds the raw weights; leave --which out"):
            self.load(self.folder / "imported", which="ema")

    def test_a_run(self):
        workdir = self.folder / "run"
        workdir.mkdir()
        own = {"version": VERSION} | json.loads(training.tiny().to_json())
        (workdir / "config.json").write_text(json.dumps(own))
        params, stats = split(small())
        with contextlib.closing(Checkpoints(workdir / "train" / "best")) as best:
            best.save(7, jax.tree.map(jax.numpy.asarray, Weights(params, stats)), {})
        sha256 = hashes.weights_sha256(params, stats)
        rows = [{"weights_sha256": sha256, "clean": 0.5}, {"weights_sha256": "0", "clean": 1}]
        (workdir / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        found = self.load(workdir)
        self.assert_same(found, small())
        self.assertEqual(found.about["accuracies"], rows[:1])
        self.assertEqual((found.about["norm"], found.about["epsilon"]), ("linf", 0.1))
        self.assertEqual(found.about["source"], "run (train, step 7, ema)")
        self.assert_same(self.load(workdir, which="ema"), small())
        with self.assertRaisesRegex(ValueError, "best of the averaged weights, .*--which raw"):
            self.load(workdir, which="raw")

        with self.subTest("`evaluate --weights RUN` is --workdir RUN"):
            given = {"weights": str(workdir), "attack": "clean", "n": 8}
            code, printed, said = evaluations.call(**given)
            self.assertEqual(code, 0, said)
            self.assertIn("convnext_n (train, step 7, ema)", printed)
            code, _, said = evaluations.call(**given, model="convnext_n")
            self.assertEqual(code, 2)
            self.assertIn("is a run, which stores its model; leave --model out", said)


class HubTest(Case):
    """A repository of the hub that says whose weights it holds, as our exports do."""

    def setUp(self):
        super().setUp()
        self.hub()
        about = NETWORK | {"preprocessing": "none", "norm": "linf", "epsilon": 0.1}
        self.settings = {
            "num_classes": 10,
            "pretrained_cfg": {"input_size": [1, 8, 8], "mean": [0.5], "std": [0.25]},
            "jaxrobust": about,
        }
        self.serve()

    def serve(self, **changes):
        settings = json.dumps(self.settings | changes).encode()
        arrays = save(as_timm(small()))
        self.server.repository("me/net", {"model.safetensors": arrays, "config.json": settings})

    def expected(self):
        moments = {"mean": np.float32([0.5]), "std": np.float32([0.25])}
        return small() | {f"normalize.{key}": value for key, value in moments.items()}

    def test_load(self):
        found = self.load("hf://me/net")
        self.assert_same(found, self.expected())
        about = found.about
        self.assertEqual((about["image_size"], about["epsilon"]), (8, 0.1))
        self.assertEqual((about["source"], about["preprocessing"]), ("hf://me/net", "none"))
        (folder,) = (self.folder / "cache").rglob("weights.safetensors")
        self.assertIn(f"imported into {folder.parent}", " ".join(self.said))

        with self.subTest("again without a network, and nothing is imported again"):
            self.server.close()
            with mock.patch.object(imports, "imported", side_effect=AssertionError):
                self.assert_same(self.load("hf://me/net"), self.expected())
        with self.subTest("a damaged copy in the cache is made again"):
            folder.write_bytes(folder.read_bytes()[:-1] + b"\7")
            self.assert_same(self.load("hf://me/net"), self.expected())

    def test_settings_that_changed_make_another_import(self):
        self.load("hf://me/net")
        self.serve(pretrained_cfg={"input_size": [1, 8, 8], "mean": [0.25], "std": [0.5]})
        self.server.files |= {  # as another revision
            path.replace("main", "v2"): body for path, body in self.server.files.items()
        }
        found = self.load("hf://me/net@v2")
        np.testing.assert_array_equal(found.stats["normalize.mean"], np.float32([0.25]))

    @pytest.mark.slow
    def test_evaluate(self):
        given = {"weights": "hf://me/net", "dataset": "digits", "attack": "clean", "n": 8}
        code, printed, said = evaluations.call(**given, out=str(self.folder / "out"))
        self.assertEqual(code, 0, said)
        self.assertIn("convnext_n (weights.safetensors)", printed)
        code, _, said = evaluations.call(**(given | {"weights": "hf://me/nothing"}))
        self.assertEqual(code, 2)
        self.assertIn("me/nothing holds no model.safetensors", said)
        self.server.close()
        code, _, said = evaluations.call(**(given | {"weights": "hf://me/other"}))
        self.assertEqual(code, 3)
        self.assertRegex(said, "hf://me/other: the hub does not answer.*`hf download me/other mod")

    def test_start(self):
        start, record = start_weights.of_config(training.tiny(init__weights="hf://me/net"))
        np.testing.assert_array_equal(start.params["head.fc.bias"], small()["head.fc.bias"])
        np.testing.assert_array_equal(start.stats["normalize.mean"], np.float32([0.5]))
        self.assertEqual(record["weights"], "hf://me/net")
        with self.subTest("a new stem takes raw images, as --init-stem does"):
            config = training.tiny(init__weights="hf://me/net", init__stem="fresh")
            start, _ = start_weights.of_config(config)
            np.testing.assert_array_equal(start.stats["normalize.mean"], np.float32([0]))
        with self.subTest("a run that has begun asks nobody"):
            self.server.close()
            workdir = self.folder / "run"
            workdir.mkdir()
            (workdir / history.START).write_text(json.dumps(record))
            config = training.tiny(init__weights="hf://me/net")
            self.assertEqual(start_weights.changed(config, workdir), "")

    def test_of_an_architecture_that_is_not_here(self):
        self.serve(jaxrobust=None, architecture="efficientnet_b0")
        with self.assertRaisesRegex(ValueError, "me/net does not name its network; give --model"):
            self.load("hf://me/net")


class PublishedTest(Case):
    """RobustBench's ids; the network is a small one under the name of another id."""

    def setUp(self):
        super().setUp()
        self.body = save(as_timm(weights()))
        self.server.files["/uc"] = self.body
        self.net = Published(
            "convnext_n", True, "Res256Crop224", 70.5, 40.25, "imagenet/Linf/x.pt",
            f"{self.server.address}/uc?id=abc",
        )  # fmt: skip
        self.enter_context(mock.patch.dict(PUBLISHED, {KEY: self.net}))
        ten = LEADERBOARDS["imagenet"]._replace(num_classes=10)
        self.enter_context(mock.patch.dict(LEADERBOARDS, imagenet=ten))

    def test_load(self):
        found = self.load(KEY)
        about = found.about
        mean = [0.485, 0.456, 0.406]
        np.testing.assert_array_equal(found.stats["normalize.mean"], np.float32(mean))
        np.testing.assert_array_equal(found.params["head.fc.bias"], weights()["head.fc.bias"])
        self.assertEqual(about["published_id"], KEY)
        self.assertEqual((about["norm"], about["epsilon"]), ("linf", 4 / 255))
        self.assertEqual(about["preprocessing"], "Res256Crop224")
        (reached,) = about["accuracies"]
        self.assertEqual((reached["clean"], reached["robust"]), (0.705, 0.4025))
        self.assertEqual(reached["published_by"], "RobustBench")

    def test_a_file_that_was_fetched_elsewhere(self):
        """As the message without a network says: under the name that it gives, or with the id."""
        self.server.close()
        with self.assertRaisesRegex(
            remote_weights.Unreachable,
            rf"run `curl -L -o {KEY}.pt '.*/uc\?id=abc'` on another machine",
        ):
            self.load(KEY)
        for name, how in ((f"{KEY}.pt", {}), ("other.pt", {"model": KEY})):
            file = self.folder / name
            file.write_bytes(self.body)
            self.assertEqual(self.load(file, **how).about["published_id"], KEY)

    def test_evaluate_and_start_take_ids(self):
        given = {"dataset": "digits", "attack": "clean", "n": 8}
        for more in ({"weights": KEY}, {"weights": KEY, "model": KEY}):
            code, _, said = evaluations.call(**given, **more)
            self.assertEqual(code, 2)
            self.assertRegex(said, "the network takes 3 channels, but .*digits.* has 1")
        config = training.tiny(init__weights=KEY)
        with self.assertRaisesRegex(ValueError, f"init.weights={KEY}: .*set model.options to"):
            start_weights.of_config(config)


class AddressTest(Case):
    def test_a_bare_address_is_a_file(self):
        self.server.files["/w.safetensors"] = save(as_timm(weights()))
        address = f"{self.server.address}/w.safetensors"
        self.assert_same(self.load(address, model="convnext_n", image_size=16), weights())
        with self.assertRaisesRegex(ValueError, "does not name its network; give --model NAME"):
            self.load(address)


class NamesTest(parameterized.TestCase):
    def test_are_one(self):
        self.assertIs(jaxrobust.load, loading.load)
        self.assertIn("load", dir(jaxrobust))
        with self.assertRaisesRegex(AttributeError, "has no attribute 'nothing'"):
            models.nothing  # noqa: B018
