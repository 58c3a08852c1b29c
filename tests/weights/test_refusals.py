"""Stored weights that cannot be read, or are not those of the network: each with its remedy."""

import json
import tarfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from safetensors.flax import save_file as save_with_jax
from safetensors.numpy import save_file

from jaxrobust.types import Weights
from jaxrobust.weights import load
from jaxrobust.weights.naming import compose, convert
from jaxrobust.weights.store import files, weights_folder
from jaxrobust.weights.store.artifact import Artifact, WeightFacts
from jaxrobust.weights.trained import kept, runs
from tests.support import sweeps
from tests.support.runs import tiny


class FileTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = Path(self.create_tempdir())

    @sweeps.rows(
        (b"", "is empty; download it again"),
        (b"\xef\xbb\xbf\r\n <!DOCTYPE html>", "is a web page, not weights"),
        (
            b"version https://git-lfs.github.com/spec/v1\n",
            "is a Git LFS pointer, not weights; fetch it with `git lfs pull`",
        ),
        (b"Not Found\n", "is text, not weights; it begins 'not found.n'. This may be"),
    )
    def test_what_is_no_file_of_weights(self, content, said):
        for name in ("w.safetensors", "w.pt"):
            (self.folder / name).write_bytes(content)
            with self.assertRaisesRegex(ValueError, f"{name} {said}"):
                files.read(self.folder / name)

    def test_readers_are_chosen_by_the_first_bytes(self):
        header = (2).to_bytes(8, "little") + b"{}" + bytes(8)
        for name, content, reader in (
            ("a.pt", header, files._read_safetensors),
            ("a.safetensors", b"PK\x03\x04" + bytes(20), files._read_torch),
            ("b.safetensors", b"\x80\x02" + bytes(20), files._read_torch),
            ("c.pt", (2**40).to_bytes(8, "little") + b"{", files._read_safetensors),  # cut short
            ("d.safetensors", b"\x01\x02" + bytes(20), files._read_safetensors),
            ("d.pt", b"\x01\x02" + bytes(20), files._read_torch),
        ):
            (self.folder / name).write_bytes(content)
            self.assertIs(files._reader(self.folder / name), reader, name)
        (self.folder / "x").write_bytes(b"\x01")
        with tarfile.open(self.folder / "e.pt", "w") as archive:
            archive.add(self.folder / "x", "\x01x")
        with self.assertRaisesRegex(ValueError, "e.pt is a tar archive; unpack it and give the we"):
            files._reader(self.folder / "e.pt")

    def test_one_set_holds_no_other_and_halves_are_cast(self):
        file = self.folder / "h.safetensors"
        save_with_jax({"w": jnp.asarray([0.5, 3.0], jnp.bfloat16)}, file)
        with self.assertRaisesRegex(ValueError, "holds one set of weights; leave --which out"):
            files.artifact(file, weights_kind="ema")
        for reads in (True, False):  # as NumPy reads them depends on the version of safetensors
            error = None if reads else TypeError("data type 'bfloat16' not understood")
            with mock.patch.object(files, "load_file", wraps=files.load_file, side_effect=error):
                (found,) = files.artifact(file, cast=True).arrays.values()
                if not reads:
                    with self.assertRaisesRegex(ValueError, "that NumPy lacks .*cast to float32"):
                        files.artifact(file)
            self.assertEqual(found.dtype, np.float32)
            self.assertEqual(found.tolist(), [0.5, 3.0])
        save_file({"w": np.complex64([1j])}, file)
        with self.assertRaisesRegex(
            ValueError, "h.safetensors: w is complex64, which cannot become fl"
        ):
            files.artifact(file, cast=True)

    def test_what_stands_in_the_metadata(self):
        file = self.folder / "m.safetensors"
        arrays = {"w": np.ones(1, np.float32)}
        save_file(arrays, file, metadata=weights_folder.metadata("convnext_n", {"dims": [8]}))
        self.assertEqual(weights_folder.stated(file), ("convnext_n", {"dims": [8]}))
        for damage in ("{", '{"architecture": "a"}', "[]"):
            save_file(arrays, file, metadata={weights_folder._NETWORK: damage})
            with self.assertRaisesRegex(ValueError, "m.safetensors: its metadata .* is damaged"):
                weights_folder.stated(file)
        save_file(arrays, file)
        self.assertIsNone(weights_folder.stated(file))
        file.write_bytes(b"none")
        self.assertIsNone(weights_folder.stated(file))

    def test_a_folder_of_other_weights_stays(self):
        folder, stats = self.folder / "new" / "w", {"normalize.mean": np.zeros(1, np.float32)}
        params = {"k": np.ones(2, np.float32)}
        own = {"architecture": "n", "options": {"dims": [8]}}
        done = weights_folder.write(folder, params, stats, own)
        self.assertEqual(done, json.loads((folder / weights_folder.CONFIG).read_text()))
        self.assertEqual(weights_folder.write(folder, params, stats, own), done)
        changes = ({"k": np.zeros(2, np.float32)}, own), (params, own | {"source": "elsewhere"})
        for other, config in changes:
            with self.assertRaisesRegex(
                ValueError, "contains other weights, or the same weights from another origin"
            ):
                weights_folder.write(folder, other, stats, config)
        self.assertEqual([p.name for p in folder.parent.iterdir()], ["w"])  # and no parts


class NetworkTest(parameterized.TestCase):
    def test_another_model_or_size_than_they_are_of(self):
        artifact = Artifact({}, WeightFacts(where="w.pt", model="resnet18"))
        made = SimpleNamespace(resized={"pos": ((1,), (2,))}, image_size=64)
        with mock.patch.object(load.networks, "network", return_value=made) as network:
            for model in (None, "resnet18"):
                self.assertIs(load.fitted(artifact, model, image_size=64, options={"a": 1}), made)
                request = network.call_args.args[1]
                self.assertEqual((request.model, request.keep_head), (model, True))
                self.assertEqual((request.image_size, request.options), (64, {"a": 1}))
            with self.assertRaisesRegex(ValueError, "w.pt holds a resnet18; leave --model=vit_s o"):
                load.fitted(artifact, "vit_s")
            with self.assertRaisesRegex(ValueError, "w.pt does not fit image size 64"):
                load.fitted(artifact)
            made.resized = {}
            self.assertIs(load.fitted(artifact), made)

    def test_moments_of_as_many_channels_as_images(self):
        shapes = {"normalize.mean": (2,)}
        found = compose._normalize({"w": 0}, ((0.5,), (0.1, 0.2)), shapes)
        np.testing.assert_allclose(found["normalize.mean"], [0.5, 0.5])
        np.testing.assert_allclose(found["normalize.std"], [0.1, 0.2])
        self.assertEqual(compose._normalize({"normalize.std": 0}, ((0.5,),) * 2, shapes), {})
        with self.assertRaisesRegex(ValueError, "mean and std have 3 channels, but images have 2"):
            compose._normalize({}, ((0.5,) * 3,) * 2, shapes)

    def test_a_network_that_normalises_twice(self):
        arrays = {"model.w": 1, "model.model.w": 2, "normalize.mean": 3}
        with self.assertRaisesRegex(
            ValueError, "^model.w and model.model.w are both present, so the network normalizes"
        ):
            convert.unwrapped(arrays)
        self.assertEqual(convert.unwrapped({"module.w": 1, convert.COUNT: 2}), {"w": 1})
        whole = {"model.w": 1, "normalize.mean": 3}
        self.assertEqual(convert.unwrapped(whole), {"w": 1, "normalize.mean": 3})
        self.assertEqual(
            convert.unwrapped({"model.w": 1, "other.w": 2}).keys(), {"model.w", "other.w"}
        )

    def test_the_way_back_needs_both_results_of_init(self):
        with self.assertRaisesRegex(
            ValueError, r"\['normalize.mean', 'normalize.std'\] missing in"
        ):
            convert.to_torch("resnet18", {"fc.bias": np.zeros(1, np.float32)}, {})

    def test_a_head_without_a_bias_for_each_class(self):
        def width(*shape):
            arrays = {"head.bias": np.zeros(shape), "w": np.zeros(1)}
            matched = tuple((key, None, [key]) for key in arrays)
            return convert.head_width(
                SimpleNamespace(head=r"head\..*", arrays=arrays, matched=matched)
            )

        self.assertEqual(width(7), 7)
        for shape in ((), (0,), (2, 3)):
            with self.assertRaisesRegex(ValueError, "head is damaged: the bias has shape"):
                width(*shape)
        none = SimpleNamespace(head="head", arrays={}, matched=())
        self.assertIsNone(convert.head_width(none))

    def test_wide_weights_are_cast_by_whom_they_belong_to(self):
        file = Path(self.create_tempfile("w.safetensors").full_path)
        save_file({"fc.bias": np.zeros(3)}, file)
        with self.assertRaisesRegex(ValueError, "w.safetensors: weights are float64, expected flo"):
            convert.load("resnet18", file)


class SizeTest(absltest.TestCase):
    """Weights of a run for images of another size."""

    def test_is_asked_of_the_network_at_that_size(self):
        config = tiny()
        weights = Weights({"w": jnp.ones(2)}, {"normalize.mean": jnp.zeros(1)})
        self.assertIs(runs.at_size(config, weights, config.model.image_size), weights)
        made, asked = ({"w": np.full(3, 2.0)}, {"normalize.mean": np.zeros(1)}), []

        def filled(shapes, rows, arrays):
            asked.append((shapes, rows, arrays))
            if len(asked) > 1:
                raise ValueError("too small")
            return made

        network = SimpleNamespace(init=lambda key: ({"w": jnp.zeros(3)}, {}))
        sizes = []

        def create(spec, **how):
            sizes.append((spec.image_size, how))
            return network

        with (
            mock.patch.object(runs.NetworkSpec, "create", create),
            mock.patch.object(runs.convert, "names", lambda *given: SimpleNamespace(rows=given)),
            mock.patch.object(runs.convert, "filled", filled),
            mock.patch.object(kept.runs, "run_config", lambda *given: config) as _,
        ):
            found = runs.at_size(config, weights, 16)
            with self.assertRaisesRegex(ValueError, "^--image_size=4: too small$"):
                kept.at_size(Path("run"), "train", weights, 4)
        np.testing.assert_array_equal(found.params["w"], [2, 2, 2])
        self.assertEqual(sizes, [(16, {"dtype": "float32"}), (4, {"dtype": "float32"})])
        shapes, (name, _), arrays = asked[0]
        self.assertEqual((name, arrays.keys()), (config.model.name, {"w", "normalize.mean"}))
        self.assertEqual(jax.tree.map(lambda a: a.shape, shapes), ({"w": (3,)}, {}))
