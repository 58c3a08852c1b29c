"""Stored weights as the start of a run, and an imported folder before the evaluation."""

import contextlib
import io
import re
from pathlib import Path
from types import MappingProxyType
from unittest import mock

import jax
import numpy as np
import pytest
from absl.testing import parameterized
from ml_collections import ConfigDict
from safetensors.numpy import load_file, save_file

from jaxrobust import models
from jaxrobust.config import NetworkSpec
from jaxrobust.evaluation.questions import target
from jaxrobust.models.modules.positions import resized
from jaxrobust.runtime.devices import compilation
from jaxrobust.training import build
from jaxrobust.training.run import loop
from jaxrobust.types import Weights
from jaxrobust.weights import start as start_weights
from jaxrobust.weights.naming import compose, convert
from jaxrobust.weights.store import hashes, weights_folder
from tests.support import result_lines, sweeps
from tests.support import runs as training
from tests.support.evaluations import call
from tests.support.parity import torch_or_skip
from tests.support.stored import as_timm, weights

OPTIONS = {"stem_strides": (1,), "depths": (1,), "dims": (8,)}  # those of `training.tiny`
FOLDER = {
    "architecture": "convnext_n",
    "num_classes": 10,
    "image_size": 8,
    "in_channels": 1,
    "preprocessing": None,
    "norm": None,
    "epsilon": None,
}


def small(**overrides) -> dict[str, np.ndarray]:
    """Weights of the network that `tiny` trains, close to what an initialization gives."""
    drawn = weights(image_size=8, **(OPTIONS | {"in_channels": 1} | overrides))
    return {
        key: array if key.startswith("normalize.") else np.float32(0.1) * array
        for key, array in drawn.items()
    }


def split(arrays):
    stats = {k: a for k, a in arrays.items() if k.startswith("normalize.")}
    return {k: a for k, a in arrays.items() if k not in stats}, stats


def tiny(path, **changes) -> ConfigDict:
    """One adversarial epoch of 4 steps from stored weights."""
    changes = {"pretrain__epochs": 0, "train__epochs": 1, "train__warmup_epochs": 0} | changes
    return training.tiny(init__weights=None if path is None else str(path), **changes)


def composed(spec: NetworkSpec, arrays, **how):
    return compose.compose(spec, convert.names(spec.name, arrays), **how)


class ComposeTest(parameterized.TestCase):
    def test_positions_are_resized_under_both_namings(self):
        small = {"dim": 8, "depth": 1, "heads": 2}
        ours = weights("vit_s", image_size=64, **small)
        names = {k.replace("patch_embed.proj.0", "patch_embed.proj"): a for k, a in ours.items()}
        spec = NetworkSpec("vit_s", 10, 32, 3, small)
        for arrays in (ours, as_timm(names)):
            start = composed(spec, arrays)
            self.assertEqual(start.resized, {"pos_embed": ((1, 17, 8), (1, 5, 8))})
            np.testing.assert_array_equal(
                start.params["pos_embed"], resized(ours["pos_embed"], (1, 5, 8))
            )
            np.testing.assert_array_equal(start.params["head.kernel"], ours["head.kernel"])

    def test_statistics_come_along_and_a_counter_does_not(self):
        ours = weights("resnet18")
        torch = {
            k.replace(".mean", ".running_mean").replace(".var", ".running_var"): a
            for k, a in as_timm(ours).items()
        }
        torch["bn1.num_batches_tracked"] = np.int64(3)
        start = composed(NetworkSpec("resnet18", 10, 16, 3), torch)
        np.testing.assert_array_equal(start.stats["bn1.mean"], ours["bn1.mean"])
        self.assertEqual(list(start.dropped), ["bn1.num_batches_tracked"])
        self.assertIn("1 left out (counts", " ".join(compose.summary(start)))

    @sweeps.fast(1, 3)
    @parameterized.parameters(
        "cait_xxs24", "convnext_n", "iso_convnext_s", "resnet18", "swin_b", "vit_m_cvst", "xcit_n12"
    )
    def test_every_architecture_has_a_stem_and_a_head(self, name):
        net = models.create(name, num_classes=10)
        params, stats = jax.eval_shape(net.init, jax.random.key(0))
        arrays = {k: np.broadcast_to(np.float32(0), a.shape) for k, a in (params | stats).items()}
        found = convert.names(name, arrays)
        self.assertEqual(convert.head_width(found), 10)
        self.assertEqual(convert.in_channels(found), 3)

    def test_a_seed_draws_the_same(self):
        spec = NetworkSpec("convnext_n", 7, 8, 1, OPTIONS)
        heads = [composed(spec, small(), head="fresh", seed=seed).params for seed in (0, 0, 1)]
        kernels = [head["head.fc.kernel"] for head in heads]
        np.testing.assert_array_equal(kernels[0], kernels[1])
        self.assertFalse(np.array_equal(kernels[0], kernels[2]))


class FreshTorchTest(parameterized.TestCase):
    def test_is_drawn_as_torch_draws_a_linear_map(self):
        """Uniform in +-1/sqrt(inputs), the bias too: the quartiles of 384 x 1000 draws say so."""
        net = models.create("xcit_n12", num_classes=1000, depth=1)
        shapes = jax.eval_shape(net.init, jax.random.key(0))
        arrays = {k: np.zeros(a.shape, np.float32) for part in shapes for k, a in part.items()}
        arrays["normalize.std"] += 1
        spec = NetworkSpec("xcit_n12", 1000, 224, 3, {"depth": 1})
        params = composed(spec, arrays, head="fresh-torch", seed=3).params
        kernel, bias = params["head.kernel"], params["head.bias"]
        bound = kernel.shape[0] ** -0.5
        for array, tolerance in ((kernel, 0.01), (bias, 0.1)):  # some 3 standard errors
            self.assertLess(np.abs(array).max(), bound)
            quartiles = np.quantile(array, [0, 0.25, 0.5, 0.75, 1]) / bound
            np.testing.assert_allclose(quartiles, [-1, -0.5, 0, 0.5, 1], atol=tolerance)
        self.assertFalse(params["blocks.0.attn.qkv.kernel"].any())
        again, other = (composed(spec, arrays, head="fresh-torch", seed=s).params for s in (3, 4))
        np.testing.assert_array_equal(again["head.kernel"], kernel)
        self.assertFalse(np.array_equal(other["head.kernel"], kernel))

    def test_the_bounds_are_torchs(self):
        torch = torch_or_skip(self)
        linear = torch.nn.Linear(48, 50_000)
        for drawn in (linear.weight.detach(), linear.bias.detach()):
            self.assertAlmostEqual(float(drawn.abs().max()), 48**-0.5, 4)


class NormalizeTest(parameterized.TestCase):
    @sweeps.rows(
        ("none", 0, 1), ("half", 0.5, 0.5), ("keep", 0.25, 0.75), ("imagenet", 0.485, 0.229)
    )
    def test_replaces_that_of_the_weights(self, name, mean, std):
        path = Path(self.create_tempdir()) / "start.safetensors"
        arrays = small(in_channels=3)
        arrays |= {"normalize.mean": np.full(3, 0.25, "f"), "normalize.std": np.full(3, 0.75, "f")}
        save_file(arrays, path)
        config = tiny(path, model__in_channels=3, init__normalize=name)
        start, record = start_weights.of_config(config)
        self.assertAlmostEqual(float(start.stats["normalize.mean"][0]), mean, 6)
        self.assertAlmostEqual(float(start.stats["normalize.std"][0]), std, 6)
        self.assertEqual(record.get("normalize", "keep"), name)
        np.testing.assert_array_equal(start.params["stem.0.kernel"], arrays["stem.0.kernel"])

    def test_of_random_weights(self):
        """They are those that a run without it draws."""
        config = tiny(None, init__normalize="half")
        start, record = start_weights.of_config(config)
        with jax.numpy_dtype_promotion("standard"):
            plain = build.phase(tiny(None), "train", 256).init(jax.random.key(config.seed))
        for key, array in plain.params.items():
            np.testing.assert_array_equal(start.params[key], array, err_msg=key)
        np.testing.assert_array_equal(start.stats["normalize.std"], [0.5])
        self.assertIsNone(record["weights"])
        self.assertIsNone(start_weights.of_config(tiny(None)))

    @sweeps.rows(
        (
            "mine",
            "init.normalize='mine'; use one of keep, none, half, imagenet, cifar10, cifar100, "
            "cifar10-robustart",
        ),
        ("cifar10", "cifar10 has 3 channels, but the images have 1; set init.normalize=half"),
    )
    def test_refuses(self, name, message):
        folder = Path(self.create_tempdir())
        save_file(small(), folder / "start.safetensors")
        for path in (None, folder / "start.safetensors"):
            with self.assertRaisesRegex(ValueError, message):
                training.quiet_run(tiny(path, init__normalize=name), folder / "run")
        compiled = mock.patch.object(compilation, "program", side_effect=AssertionError("compiled"))
        with compiled, self.assertRaisesRegex(ValueError, message):
            start_weights.of_config(tiny(None, init__normalize=name))
        self.assertFalse((folder / "run").exists())


class StartTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = Path(self.create_tempdir())
        self.file = self.folder / "start.safetensors"
        self.workdir = self.folder / "run"

    def stored(self, arrays=None, file=None) -> Path:
        save_file(small() if arrays is None else arrays, file or self.file)
        return file or self.file

    def imported(self, arrays=None, **changes) -> Path:
        weights = split(small() if arrays is None else arrays)
        weights_folder.write(self.folder / "imported", *weights, FOLDER | changes)
        return self.folder / "imported"

    def run_to_first_step(self, config):
        """(what it says, the state before the first step)."""
        seen = []
        real = loop.steps

        def steps(run, state, stop):
            seen.append(jax.device_get(state._replace(key=0)))
            return real(run, state, stop)

        with mock.patch.object(loop, "steps", steps):
            said = training.quiet_run(config, self.workdir)
        return said, seen[0] if seen else None

    @pytest.mark.slow
    def test_trains_from_a_file_and_says_so_in_every_record(self):
        said, state = self.run_to_first_step(tiny(self.stored()))
        for key, array in small().items():
            np.testing.assert_array_equal((state.params | state.stats)[key], array, err_msg=key)
        for key, array in state.params.items():
            np.testing.assert_array_equal(state.ema[key], array, err_msg=key)
        sha256 = hashes.weights_sha256(*split(small()))
        (record,) = result_lines.read(self.workdir)
        self.assertEqual(record["init"]["weights_sha256"], sha256)
        self.assertEqual(record["init"]["start_sha256"], sha256)
        self.assertEqual(record["init"]["weights"], str(self.file))
        self.assertIn(f"starting from {self.file}, sha256 {sha256[:12]}", said)

        with self.subTest("another file under the same name is noticed, and a missing one is fine"):
            self.assertNotIn(
                "now holds different weights", training.quiet_run(tiny(self.file), self.workdir)
            )
            self.stored({key: array + 1 for key, array in small().items()})
            said = training.quiet_run(tiny(self.file), self.workdir)
            self.assertRegex(
                said, "now holds different weights .* continues from its own checkpoint"
            )
            self.file.unlink()
            training.quiet_run(tiny(self.file), self.workdir)
            with self.assertRaisesRegex(ValueError, "init.weights: '.*' there, '.*other.pt' now"):
                training.quiet_run(tiny("other.pt"), self.workdir)

        with self.subTest("its best weights start another run"):
            (best,) = [r["weights_sha256"] for r in result_lines.read(self.workdir)]
            source, self.workdir = self.workdir, self.folder / "second"
            said, state = self.run_to_first_step(tiny(source))
            self.assertEqual(hashes.weights_sha256(state.params, state.stats), best)
            self.assertRegex(said, r"starting from .*run \(train, step 4, ema\)")
            config = tiny(source).unlock()
            config.model.options.dims = (16,)
            with self.assertRaisesRegex(ValueError, r"dims=\[8\].*, but the config .*dims=\[16\]"):
                start_weights.of_config(config)

    @pytest.mark.slow
    def test_from_random_weights(self):
        training.quiet_run(tiny(None), self.workdir)
        self.assertNotIn("init", result_lines.read(self.workdir)[0])
        self.assertNotIn("compiled", training.quiet_run(tiny(None), self.workdir))
        with self.assertRaisesRegex(ValueError, "init.weights: None there, 'x.pt' now"):
            training.quiet_run(tiny("x.pt"), self.workdir)

    def test_folder_with_a_new_stem_and_head(self):
        arrays = small(in_channels=3, stem_strides=(2,))
        arrays["head.fc.bias"], arrays["head.fc.kernel"] = np.zeros(5, "f"), np.zeros((8, 5), "f")
        arrays |= {"normalize.mean": np.zeros(1, "f"), "normalize.std": np.ones(1, "f")}
        path = self.imported(arrays, num_classes=5)
        start, _ = start_weights.of_config(tiny(path, init__stem="fresh", init__head="fresh"))
        self.assertEqual(start.params["stem.0.kernel"].shape, (1, 1, 1, 8))
        self.assertEqual(start.params["head.fc.kernel"].shape, (8, 10))
        np.testing.assert_array_equal(start.params["head.norm.scale"], arrays["head.norm.scale"])
        said = " ".join(compose.summary(start))
        self.assertIn("6 newly initialized: ", said)
        self.assertIn("6 left out (is newly initialized): ", said)

    @sweeps.rows(
        ({}, "none.pth", {}, r"^init.weights=[^ ]*none.pth: no such file"),
        ({}, "", {}, "holds no weights; give a file, a folder that"),
        ({"dims": (16,)}, None, {}, "weights do not fit.*head.norm.scale"),
        ({}, None, {"init__stem": "new"}, "init.stem='new'; use one of keep, fresh"),
    )
    def test_refuses_before_anything_is_written(self, overrides, name, changes, message):
        path = self.stored(small(**overrides)) if name is None else self.folder / name
        with self.assertRaisesRegex(ValueError, f"(?s){message}"):
            training.quiet_run(tiny(path, **changes), self.workdir)
        self.assertFalse(self.workdir.exists())

    def test_refuses_other_networks_classes_and_types(self):
        with self.assertRaisesRegex(
            ValueError, "are weights of convnext_t; set model.name=convnext_t"
        ):
            start_weights.of_config(tiny(self.imported(architecture="convnext_t")))
        arrays = small() | {"head.fc.bias": np.zeros(5, "f"), "head.fc.kernel": np.zeros((8, 5))}
        with self.assertRaisesRegex(ValueError, "head has 5 classes.*set init.head=fresh"):
            start_weights.of_config(tiny(self.stored(arrays)))
        halves = {key: array.astype(np.float16) for key, array in small().items()}
        with self.assertRaisesRegex(ValueError, "float16 .*to round them, .*--cast"):
            start_weights.of_config(tiny(self.stored(halves)))

    def test_refuses_other_options_of_the_same_shapes(self):
        """`stem_strides` changes no shape of a ConvStem, nor do the strides between stages."""
        cvst = {"stem_widths": (4, 8), "depths": (1,), "dims": (8,)}
        arrays = weights("convnext_n_cvst", image_size=8, in_channels=1, **cvst)
        theirs = {"stem_strides": [2, 2]} | {k: list(v) for k, v in cvst.items()}
        told = {"architecture": "convnext_n_cvst", "options": theirs}

        def config(**options):
            changed = tiny(self.folder / "imported", model__name="convnext_n_cvst").unlock()
            changed.model.options = cvst | options
            return changed

        weights_folder.write(self.folder / "imported", *split(arrays), FOLDER | told)
        start_weights.of_config(config(stem_strides=(2, 2), drop_path=0.1))
        with self.assertRaisesRegex(
            ValueError,
            r"they are weights of convnext_n_cvst with .*stem_strides=\[2, 2\].*, but the config "
            r"has convnext_n_cvst with (?!.*\[2, 2\]).*; set model.options to match",
        ):
            start_weights.of_config(config())
        start_weights.of_config(config(stem_strides=(1, 1)))  # said, so meant
        changed = config(stem_strides=(1, 1))
        changed.init.stem = "fresh"
        start_weights.of_config(changed)
        with (
            self.subTest("so does the file alone"),
            self.assertRaisesRegex(ValueError, "set model.op"),
        ):
            changed = config()
            changed.init.weights = str(self.folder / "imported" / weights_folder.WEIGHTS)
            start_weights.of_config(changed)


class OtherNamesTest(parameterized.TestCase):
    """Weights serve every network of their family and shapes, whatever its name is."""

    small = MappingProxyType({"dim": 8, "depth": 1, "heads": 2})

    def imported(self, name, **options) -> Path:
        arrays = weights(name, in_channels=1, **options)
        stats = {k for k in arrays if re.search(r"normalize|\.(mean|var)$", k)}
        parts = ({k: a for k, a in arrays.items() if (k in stats) == s} for s in (False, True))
        config = FOLDER | {"architecture": name, "options": options}
        folder = Path(self.create_tempdir()) / "imported"
        weights_folder.write(folder, *parts, config)
        return folder

    def start(self, path, name, options, **changes):
        """(the start of a network for 8 px, what is said)."""
        own = {"model__name": name, "model__options": ConfigDict(options)}
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            start, _ = start_weights.of_config(tiny(path, **own, **changes))
        return start, said.getvalue()

    @sweeps.rows(
        ("xcit_n12", {}, "xcit_n12_p4", {}, "stem_strides=(2, 2, 2, 2), here (1, 1, 2, 2)"),
        ("xcit_n12", {}, "xcit_n12", {"stem_strides": (1, 2, 2, 2)}, "here (1, 2, 2, 2)"),
        ("xcit_n12", {"stem_strides": (1, 1, 2, 2)}, "xcit_n12_p4", {}, ""),
        ("vit_s", {"stem_strides": (8,)}, "deit_s", {"stem_strides": (8,)}, ""),
    )
    def test_starts(self, theirs, their_options, ours, our_options, said):
        path = self.imported(theirs, **self.small, **their_options)
        start, printed = self.start(path, ours, self.small | our_options)
        self.assertEmpty(start.fresh)
        stored = load_file(path / weights_folder.WEIGHTS)
        np.testing.assert_array_equal(start.params["norm.scale"], stored["norm.scale"])
        self.assertIn(said, printed)
        self.assertEqual(bool(said), "trained with" in printed)

    def test_what_computes_something_else_from_the_same_shapes_is_refused(self):
        path = self.imported("xcit_n12", **self.small)  # normalizes the class token alone
        with self.assertRaisesRegex(ValueError, "weights of xcit_n12; set model.name=xcit_n12"):
            self.start(path, "xcit_t12", self.small)

    def test_an_evaluation_under_the_name_of_the_same_network(self):
        path = self.imported("vit_s", stem_strides=(8,), **self.small)
        self.assertEqual(target.of_folder(path, "deit_s", None).network.name, "vit_s")
        with self.assertRaisesRegex(ValueError, "holds a vit_s; leave --model=vit_b out"):
            target.of_folder(path, "vit_b", None)


class FolderTest(parameterized.TestCase):
    """`evaluate --weights FOLDER`."""

    def setUp(self):
        super().setUp()
        self.folder = Path(self.create_tempdir()) / "imported"
        # The channel count is enough for file weights; their options are those of the name.
        arrays = {k: np.float32(0.1) * a for k, a in weights(image_size=8, in_channels=1).items()}
        weights_folder.write(self.folder, *split(arrays), FOLDER | {"epsilon": 0.1, "norm": "l2"})

    @pytest.mark.slow
    def test_the_folder_says_what_it_is(self):
        out = str(self.folder.parent / "out")
        given = {"weights": str(self.folder), "dataset": "digits", "attack": "clean", "out": out}
        code, printed, said = call(**given, n=16)
        self.assertEqual(code, 0, said)
        self.assertIn("convnext_n (weights.safetensors)", printed)
        (record,) = result_lines.read(Path(out))
        self.assertEqual(
            record["weights_sha256"], weights_folder.about(self.folder)["weights_sha256"]
        )
        code, _, said = call(**given, model="convnext_t")
        self.assertEqual(code, 2)
        self.assertIn("holds a convnext_n; leave --model=convnext_t out", said)

    def test_flags_that_contradict_it(self):
        given = {"weights": str(self.folder), "dataset": "digits", "attack": "clean", "n": 8}
        code, _, said = call(**given, num_classes=7)
        self.assertEqual(code, 2)
        self.assertRegex(said, "--num_classes=7, but .*imported has 10 classes; leave it out")

    @sweeps.rows(
        (None, 224, "Res256Crop224"),
        ("bilinear-256-crop-224", 224, "bilinear-256-crop-224"),
        ("bilinear-0.875", 224, "bilinear-0.875"),
        ("bicubic-0.875", 224, None),
        ("bicubic-0.9", 256, "bicubic-0.9"),
        (None, 256, ""),
    )
    def test_preprocessing_that_contradicts_it(self, given, size, expected):
        network = NetworkSpec("convnext_n", image_size=224)
        origin = target.Subject(network, expected="Res256Crop224")
        photographs = mock.Mock(image_shape=None)
        if expected is None:
            with self.assertRaisesRegex(
                ValueError,
                "--preprocessing=bicubic-0.875, but these weights expect Res256Crop224; le",
            ):
                target.preprocessing(origin, size, photographs, given)
            same = mock.Mock(image_shape=(224, 224, 3))  # prepared before
            self.assertEqual(target.preprocessing(origin, size, same, "none"), "none")
        else:
            found = target.preprocessing(origin, size, photographs, given)
            self.assertEqual(found or "", expected)

    def test_damage_is_named(self):
        file = self.folder / "weights.safetensors"
        file.write_bytes(file.read_bytes()[:-4] + b"\1\2\3\4")
        with self.assertRaisesRegex(
            ValueError, "not the file that config.json next to it describes"
        ):
            weights_folder.about(self.folder)
        file.unlink()
        with self.assertRaisesRegex(ValueError, "no weights.safetensors; copy both"):
            weights_folder.about(self.folder)
        (self.folder / "config.json").write_text('{"architecture": "convnext_n"}')
        with self.assertRaisesRegex(ValueError, "lacks num_classes.*import the weights again"):
            weights_folder.about(self.folder)


class RunTest(parameterized.TestCase):
    """Which networks start which, by their options and shapes alone."""

    @sweeps.rows(
        ({}, {}, ""),
        (
            {"dims": (16,)},
            {},
            r"(?s)weights of convnext_n with .*16.*; set model.options to match$",
        ),
        ({"stem_strides": (2,)}, {}, "only the stem differs"),
        ({"stem_strides": (2,)}, {"init__stem": "fresh"}, ""),
        (
            {"name": "convnext_t", "dims": (16,)},
            {},
            "weights of convnext_t; set model.name=convnext_t$",
        ),
        (
            {},
            {"model__name": "convnext_n_cvst", "model__options": ConfigDict({"depths": (1,)})},
            "set model.name=convnext_n, or init.stem=fresh and model.name=convnext_n_cvst$",
        ),
        ({"num_classes": 5}, {}, "head has 5 classes, but model.num_classes=10; set init.head=fr"),
        ({"num_classes": 5}, {"init__head": "fresh"}, ""),
        ({"num_classes": 5}, {"init__head": "fresh-torch"}, ""),
        (
            {"in_channels": 3},
            {},
            "expect images with 3 channels, but model.in_channels=1; give data",
        ),
        ({"in_channels": 3}, {"init__stem": "fresh"}, "they normalize images with 3 channels"),
    )
    def test_of_its_last_phase(self, theirs, changes, message):
        sizes = {f"model__{k}": v for k, v in theirs.items() if k not in OPTIONS}
        options = OPTIONS | {k: v for k, v in theirs.items() if k in OPTIONS}
        start = tiny(None, model__options=ConfigDict(options), **sizes)
        refused = self.assertRaisesRegex(ValueError, message)
        with refused if message else contextlib.nullcontext():
            start_weights.check_run(start, tiny("w", **changes))

    def test_a_phase_passes_its_weights_on(self):
        weights = Weights(*split(small()))
        config = tiny(None)
        self.assertIs(start_weights.handed_on(config, config, "train", weights), weights)
        for part, changes in (("head.fc", {"head": "fresh"}), ("stem.0", {"stem": "fresh"})):
            changed = tiny(None, **{f"train__{key}": value for key, value in changes.items()})
            found = start_weights.handed_on(config, changed, "train", weights).params
            differing = [k for k, array in weights.params.items() if (array != found[k]).any()]
            self.assertIn(f"{part}.kernel", differing)
            self.assertTrue(all(key.startswith(part.partition(".")[0]) for key in differing))
        changed = tiny(None, train__normalize="half")
        found = start_weights.handed_on(config, changed, "train", weights)
        np.testing.assert_array_equal(found.stats["normalize.std"], [0.5])
        with self.assertRaisesRegex(ValueError, "train starts from another .*set train.head=fresh"):
            start_weights.handed_on(config, tiny(None, model__num_classes=5), "train", weights)
