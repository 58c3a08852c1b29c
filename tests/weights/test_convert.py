"""The conversion engine: both directions, layouts, and files that must be refused.

The rows of each architecture are tested next to it.
"""

import functools
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from safetensors.numpy import save_file

from jaxrobust import models
from jaxrobust.models.interface.renaming import drop, linear_oi, row
from jaxrobust.models.published import PUBLISHED
from jaxrobust.weights.naming import convert
from jaxrobust.weights.store import files
from tests.support import corpus, paths, reference, sweeps
from tests.support.corpus import KWARGS
from tests.support.families import by_family
from tests.support.modules import hidden
from tests.support.parity import torch_or_skip


@functools.cache
def random_weights(name="convnext_n", **overrides) -> dict[str, np.ndarray]:
    """Params and stats of a network under our names, no two arrays alike."""
    net = models.create(name, **KWARGS, **overrides)
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    draw = np.random.default_rng(0)
    weights = {k: draw.random(v.shape, np.float32) for k, v in (shapes[0] | shapes[1]).items()}
    channels = weights["normalize.mean"].shape
    return weights | {
        "normalize.mean": np.zeros(channels, np.float32),
        "normalize.std": np.ones(channels, np.float32),
    }


def split(name: str, weights) -> tuple[dict, dict]:
    stats = jax.eval_shape(models.create(name, **KWARGS).init, jax.random.key(0))[1]
    return {k: v for k, v in weights.items() if k not in stats}, {k: weights[k] for k in stats}


def as_timm(weights: dict[str, np.ndarray], name="convnext_n") -> dict[str, np.ndarray]:
    return convert.to_torch(name, *split(name, weights))


SOURCE = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3)}
EXPECTED = {"a.kernel": (3, 2)}
ROW = row(r"a\.weight", "a.kernel", linear_oi)


class RenameTest(parameterized.TestCase):
    def test_rows_rename_and_move(self):
        out = convert.rename([ROW], SOURCE, EXPECTED)
        np.testing.assert_array_equal(out["a.kernel"], SOURCE["a.weight"].T)
        self.assertFalse(np.shares_memory(out["a.kernel"], SOURCE["a.weight"]))

    def test_one_name_fills_several(self):
        fused = row(r"(\w+)\.weight", (r"\1.q", r"\1.k"), lambda a: (a[:1], a[1:]))
        out = convert.rename([fused], SOURCE, {"a.q": (1, 3), "a.k": (1, 3)})
        np.testing.assert_array_equal(out["a.k"], [[3, 4, 5]])

    def test_dropped_and_resized(self):
        rows = [
            row(r"a\.weight", "a", resize=lambda array, shape: np.resize(array, shape)),
            drop(r"count", "not needed"),
        ]
        source = SOURCE | {"count": np.zeros((), np.int64)}
        out = convert.rename(rows, source, {"a": (2, 4)})
        self.assertEqual(out["a"].shape, (2, 4))

    @sweeps.rows(
        (["0"], EXPECTED, "2 weights .*a.kernel: not filled.*a.weight: 0 rows match"),
        (["1", "1"], EXPECTED, "a.weight: 2 rows match, expected 1"),
        (["1"], EXPECTED | {"b": (1,)}, "b: not filled by any source name"),
        (["1"], {"a.kernel": (2, 3)}, r"shape \(3, 2\), but a.kernel has shape \(2, 3\)"),
        (["1"], {}, "maps to a.kernel, which this network does not have"),
    )
    def test_faults(self, numbers, expected, message):
        rows = [{"1": ROW, "0": row("b", "b")}[n] for n in numbers]
        with self.assertRaisesRegex(ValueError, "(?s)" + message):
            convert.rename(rows, SOURCE, expected)

    def test_what_cannot_be_turned_is_one_problem(self):
        """Not a second one, that its name here is not filled."""
        split = row(r"(\w+)\.weight", (r"\1.q", r"\1.k"), lambda a: np.split(a, 5))
        with self.assertRaisesRegex(ValueError, r"^1 weights .*:\n.*does not fit a\.q, a\.k$"):
            convert.rename([split], SOURCE, {"a.q": (1, 3), "a.k": (1, 3)})

    def test_all_problems_in_one_message(self):
        source = SOURCE | {"b": np.zeros(2, np.float16), "c": np.zeros(1, np.float32)}
        rows = [ROW, row("b", "b")]
        expected = EXPECTED | {"b": (2,), "d": (1,)}
        with self.assertRaisesRegex(ValueError, "(?s)^3 weights.*b: dtype.*c: 0 rows.*d: not fill"):
            convert.rename(rows, source, expected)

    @sweeps.rows(
        ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375), ["mean", "std"]),  # of 0 to 255
        ((123.675, 116.28, 103.53), (0.229, 0.224, 0.225), ["mean"]),
        ((0.485, 0.456, 0.406), (58.395, 57.12, 57.375), ["std"]),
        ((0.485, 0.456, 103.53), (0.229, 0.224, 0.225), ["mean"]),
        ((0.5, 0.5, 1.01), (0.5, 0.5, 0.5), ["mean"]),
        ((0.5, 0.5, -0.01), (0.5, 0.5, 0.5), ["mean"]),
        ((0.5, 0.5, 0.5), (0.5, 0.5, 1.01), ["std"]),
        ((0.5, 0.5, 0.5), (0.5, 0.5, 0.0), ["std"]),
        ((0.5, 0.5, 0.5), (0.5, 0.5, -0.5), ["std"]),
    )
    def test_normalisation_is_of_pixels_up_to_1(self, mean, std, wrong):
        """Also where only one of the two, or one of its channels, is not."""
        arrays = {"normalize.mean": np.float32(mean), "normalize.std": np.float32(std)}
        with self.assertRaises(ValueError) as caught:
            convert.rename([row(r"(.+)", r"\1")], arrays, dict.fromkeys(arrays, (3,)))
        said = re.findall(r"e\.(\w+): does not fit \[0, 1\] pixels.* by 255", str(caught.exception))
        self.assertEqual(said, wrong)

    @sweeps.rows(((0, 0.5, 1), (1e-3, 0.5, 1)), ((0.485,) * 3, (0.229,) * 3))
    def test_normalisation_that_is(self, mean, std):
        arrays = {"normalize.mean": np.float32(mean), "normalize.std": np.float32(std)}
        rows = [row(r"(.+)", r"\1")]
        self.assertEqual(
            convert.rename(rows, arrays, dict.fromkeys(arrays, (3,))).keys(), arrays.keys()
        )

    def test_double_weights_have_a_double_normalisation(self):
        weights = {k: v.astype(np.float64) for k, v in as_timm(random_weights()).items()}
        weights = {k: v for k, v in weights.items() if not k.startswith("normalize.")}
        both = convert.from_torch("convnext_n", weights, num_classes=10)
        self.assertEqual({a.dtype for part in both for a in part.values()}, {np.dtype("float64")})


class PrefixTest(parameterized.TestCase):
    @sweeps.rows(
        "",
        "module.",
        "base_model.",
        "model.",
        "module.base_model.",
        "module.base_model.model.",
        "_orig_mod.module.",
    )
    def test_wrappers(self, prefix):
        names = convert.unwrapped({f"{prefix}stem.0.weight": 1, f"{prefix}head.fc.bias": 2})
        self.assertEqual(names, {"stem.0.weight": 1, "head.fc.bias": 2})

    @sweeps.rows("", "module.base_model.")
    def test_normalisation_may_stand_outside(self, prefix):
        wrapped = {f"{prefix}normalize.mean": 1, f"{prefix}model.stem.0.weight": 2}
        self.assertEqual(convert.unwrapped(wrapped), {"normalize.mean": 1, "stem.0.weight": 2})


def check_round_trips(test, names: list[str]) -> None:
    for name in names:
        with test.subTest(name):
            check_round_trip(test, name)


def check_round_trip(test, name: str) -> None:
    """The layout of the reference and back gives the same bits, of float64 too."""
    sizes = {"num_classes": 3, "image_size": models.member(name).counted_at}
    params, stats = jax.eval_shape(models.create(name, **sizes).init, jax.random.key(0))
    draw = np.random.default_rng(0)
    drawn = [{k: draw.random(v.shape) for k, v in part.items()} for part in (params, stats)]
    normalize = {"normalize.mean": np.zeros(3), "normalize.std": np.ones(3)}
    for dtype in (np.float32, np.float64):
        params, stats = (
            {k: array.astype(dtype) for k, array in part.items()}
            for part in (drawn[0], drawn[1] | normalize)
        )
        theirs = convert.to_torch(name, params, stats)
        test.assertTrue(all(a.flags.c_contiguous for a in theirs.values()))
        test.assertEqual(
            {a.dtype for a in theirs.values() if a.dtype.kind == "f"}, {np.dtype(dtype)}
        )
        back = convert.from_torch(name, theirs, **sizes)
        for ours, again in zip((params, stats), back, strict=True):
            test.assertEqual(ours.keys(), again.keys())
            for key in ours:
                np.testing.assert_array_equal(ours[key], again[key], err_msg=key)
                test.assertEqual(ours[key].dtype, again[key].dtype, key)


# Above 30 million parameters, or named as a smaller one is.
_LARGE = re.compile(
    r"convnext_[sbl].*|vit_[mb].*|swin_.|wide_.*|cait_s24|xcit_([ml]12|[st]24).*|xcit_[st]12_p."
    r"|wrn_(?!a1$).*|robustresnet.*|robnet.*|advrush.*|racl.*|cifar_(wrn|vgg16_224).*"
)
LARGE = [name for name in models.available() if _LARGE.fullmatch(name)]
FAST = ("cifar_vit", "convnext_n", "resnet18", "vit_s", "xcit_n12")
FAST_IDS = ("Mo2022When_ViT-B", "Salman2020Do_R18")
LISTINGS = {
    path.stem: path for path in (paths.GOLDEN / "models").glob("*.tsv") if path.stem in PUBLISHED
}


@pytest.mark.matrix
class SlowLayoutTest(parameterized.TestCase):
    @sweeps.rows(*by_family(LARGE))
    def test_round_trip(self, _, names):
        check_round_trips(self, names)


class LayoutTest(parameterized.TestCase):
    @sweeps.rows(*FAST)
    def test_round_trip(self, name):
        check_round_trips(self, [name])

    @parameterized.parameters(*by_family(set(models.available()) - {*LARGE, *FAST}))
    @pytest.mark.slow
    def test_round_trip_of_the_others(self, _, names):
        check_round_trips(self, names)

    @sweeps.rows(*FAST_IDS)
    def test_names_shapes_types_and_order_are_the_published_ones(self, layout):
        self.check_published(layout)

    @parameterized.parameters(*by_family(set(LISTINGS) - set(FAST_IDS)))
    @pytest.mark.slow
    def test_names_shapes_types_and_order_of_the_others(self, _, layouts):
        for layout in layouts:
            with self.subTest(layout):
                self.check_published(layout)

    def check_published(self, layout):
        published = PUBLISHED[layout]
        sizes = {"num_classes": published.board.num_classes}
        net = models.create(published.model, image_size=published.board.image_size, **sizes)
        params, stats = (
            {k: np.broadcast_to(np.float32(0), v.shape) for k, v in part.items()}
            for part in jax.eval_shape(net.init, jax.random.key(0))
        )
        stats |= {
            "normalize.mean": np.zeros(3, np.float32),
            "normalize.std": np.ones(3, np.float32),
        }
        if published.normalised:
            stats["normalize.mean"] = np.array(published.board.mean, np.float32)
            stats["normalize.std"] = np.array(published.board.std, np.float32)
        theirs = convert.to_torch(published.model, params, stats, layout=layout)
        wanted = reference.entries(LISTINGS[layout])
        self.assertEqual(
            [(k, a.shape, str(a.dtype)) for k, a in theirs.items()],
            [(name, shape, dtype.removeprefix("torch.")) for name, shape, dtype in wanted],
        )

    def test_published_normalisation_in_float64(self):
        """As it is written, or as float32 had rounded it; the layer holds what it was given."""
        layout = "Salman2020Do_R18"
        board = PUBLISHED[layout].board
        net = models.create("resnet18", image_size=board.image_size, num_classes=board.num_classes)
        params, stats = (
            {k: np.broadcast_to(np.float64(1), v.shape) for k, v in part.items()}
            for part in jax.eval_shape(net.init, jax.random.key(0))
        )
        for mean, std in ((board.mean, board.std), np.float32((board.mean, board.std))):
            stats |= {"normalize.mean": np.float64(mean), "normalize.std": np.float64(std)}
            theirs = convert.to_torch("resnet18", params, stats, layout=layout)
            self.assertEqual({str(a.dtype) for a in theirs.values()}, {"float64", "int64"})
            np.testing.assert_array_equal(theirs["normalize.mean"].ravel(), np.float64(mean))
        stats["normalize.mean"] = stats["normalize.mean"] + 1e-7
        with self.assertRaisesRegex(ValueError, "builds this id with .* and ignores others"):
            convert.to_torch("resnet18", params, stats, layout=layout)

    def test_refusals(self):
        params, stats = split("convnext_n", random_weights())
        grey = stats | {"normalize.mean": np.full(3, 0.5, np.float32)}
        for arguments, layout, message in (
            (("convnext_n", params, stats), "tim", "unknown layout 'tim'; use one of timm,"),
            (
                ("convnext_n", params, stats),
                "Singh2023Revisiting_ConvNeXt-T-ConvStem",
                "is a convnext_t_cvst, not a convnext_n",
            ),
            (("convnext_n", params, grey), "timm", r"mean \[0\.5, .*no normalization layer.*modul"),
            (
                ("convnext_b", params, stats),
                "Liu2023Comprehensive_ConvNeXt-B",
                "builds this id with ImageNet's mean and std and ignores others",
            ),
            (("convnext_t", params, stats), "timm", "these are not the weights of convnext_t"),
            (
                ("convnext_n", params | {"more": np.zeros(1, np.float32)}, stats),
                "timm",
                "'more'.* do not fit convnext_n",
            ),
            (
                ("convnext_n", {k: v.astype(np.float16) for k, v in params.items()}, stats),
                "timm",
                "weights are float16, expected all float32",
            ),
            (
                ("convnext_n", {k: v.astype(np.float64) for k, v in params.items()}, stats),
                "timm",
                "weights are float64, expected all float32 or all float64",
            ),
        ):
            with self.subTest(message), self.assertRaisesRegex(ValueError, message):
                convert.to_torch(*arguments, layout=layout)


class LoadTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = Path(self.create_tempdir())
        self.weights = dict(random_weights())

    def saved(self, arrays, name="weights.safetensors") -> Path:
        save_file(arrays, self.folder / name)
        return self.folder / name

    def assert_loads(self, path, **options):
        params, stats = convert.load("convnext_n", path, **KWARGS, **options)
        self.assertEqual((params | stats).keys(), self.weights.keys())
        for name, array in (params | stats).items():
            np.testing.assert_array_equal(array, self.weights[name], err_msg=name)

    def test_our_names_and_timms(self):
        self.assert_loads(self.saved(self.weights))
        self.assert_loads(self.saved(as_timm(self.weights)))

    @sweeps.rows(("convnext_n", 1), ("convnext_n_cvst", 40), ("vit_s_cvst", 64), ("xcit_n12", 20))
    def test_channels_are_those_of_the_images(self, name, channels):
        # More than the stem's first convolution makes: 32, 48 and 16.
        weights = random_weights(name, in_channels=channels)
        _, stats = convert.load(name, self.saved(weights), **KWARGS)
        self.assertEqual(stats["normalize.mean"].shape, (channels,))

    def test_our_names_that_do_not_fit_are_listed(self):
        self.weights["extra.kernel"] = np.zeros(3, np.float32)
        self.weights["head.fc.bias"] = np.zeros(7, np.float32)
        del self.weights["normalize.std"]
        with self.assertRaisesRegex(
            ValueError,
            r"(?s)weights.safetensors: 3 weights do not fit; check the model name, num_classes.*"
            r"extra\.kernel: maps to .*head\.fc\.bias: shape \(7,\).*normalize\.std: not filled",
        ):
            convert.load("convnext_n", self.saved(self.weights), **KWARGS)

    def test_of_many_that_do_not_fit_five_are_shown(self):
        self.weights |= {f"extra{i}.kernel": np.zeros(3, np.float32) for i in range(70)}
        with self.assertRaisesRegex(ValueError, "70 weights do not fit.*\n(.*\n){5}.*and 65 more$"):
            convert.load("convnext_n", self.saved(self.weights), **KWARGS)

    def test_the_right_model_is_named(self):
        arrays = dict.fromkeys(models.torch_keys("convnext_b_cvst"), np.zeros(1, np.float32))
        with self.assertRaisesRegex(ValueError, "all names match convnext_b_cvst, convnext_l"):
            convert.from_torch("convnext_t", arrays)

    @sweeps.rows(*corpus.ARRAYS, *corpus.BYTES)
    def test_broken_files(self, case):
        path, message = corpus.write(case, self.folder / "broken", as_timm(self.weights))
        with self.assertRaisesRegex(ValueError, "(?s)" + message):
            convert.load("convnext_n", path, **KWARGS)

    @sweeps.rows(
        "",
        "state_dict/model",
    )
    def test_torch_files(self, place):
        torch = torch_or_skip(self)
        tree = {f"module.{k}": torch.tensor(v) for k, v in as_timm(self.weights).items()}
        for key in reversed(place.split("/") if place else []):
            tree = {"epoch": 3, key: tree, "args": {"lr": 1.0}}
        path = self.folder / "weights.pth.tar"
        torch.save(tree, path)
        self.assert_loads(path)

    def test_pytorchs_own_average(self):
        torch, path = torch_or_skip(self), self.folder / "swa.pt"
        net = torch.nn.Linear(2, 1)
        average = torch.optim.swa_utils.AveragedModel(net)
        torch.nn.init.constant_(average.module.bias, 7)
        torch.save({"model": net.state_dict(), "swa_model": average.state_dict()}, path)
        found = convert.unwrapped(files.read(path))
        self.assertEqual(found.keys(), net.state_dict().keys())  # without `n_averaged`
        np.testing.assert_array_equal(found["bias"], [7])

    def test_averages_that_are_not_there(self):
        torch, path = torch_or_skip(self), self.folder / "ema.pt"
        tensors = {k: torch.tensor(v) for k, v in as_timm(self.weights).items()}
        for content, which, message in (
            ({"state_dict_ema": tensors}, "raw", "only averaged weights, under 'state_dict_ema'"),
            ({"state_dict": tensors, "ema": {"decay": 0.9}}, "ema", "'ema' holds no state dict of"),
            (
                {"unaveraged_model_state_dict": tensors},
                "ema",
                "only raw weights, under 'unaveraged_model_state_dict'; ask for raw",
            ),
        ):
            torch.save(content, path)
            with self.subTest(which), self.assertRaisesRegex(ValueError, message):
                convert.load("convnext_n", path, weights_kind=which, **KWARGS)
        torch.save({"state_dict": {}, "model_ema": {"module": tensors, "decay": 0.9}}, path)
        self.assert_loads(path)

    def test_tensors_that_are_no_arrays(self):
        torch, path = torch_or_skip(self), self.folder / "strange.pt"
        head = torch.zeros(10, 256)
        loop: dict = {}
        loop["model"] = loop
        for content, message in (
            (
                {"head.fc.weight": head.to_sparse()},
                r"head\.fc\.weight is not a plain array .*sparse",
            ),
            ({"head.fc.weight": head.to("meta")}, "head.fc.weight is not a plain array .*meta"),
            ({"head.fc.weight": head.to(torch.float8_e4m3fn)}, "not a plain array .*float8_e4m3fn"),
            (loop, "holds no state dict"),
        ):
            torch.save(content, path)
            with self.subTest(message), self.assertRaisesRegex(ValueError, message):
                files.read(path)

    def test_broken_torch_files(self):
        torch, path = torch_or_skip(self), self.folder / "bad.pt"
        tensors = {k: torch.tensor(v) for k, v in as_timm(self.weights).items()}
        for content, message in (
            ({"state_dict": tensors, "hook": Path("/")}, "would run code.*torch.save.model.state"),
            ([torch.zeros(2)], "holds no state dict"),
            ({"epoch": 3}, "holds no state dict"),
            ({k: v.half() for k, v in tensors.items()}, "dtype float16, expected float32"),
            (
                {k: v.bfloat16() for k, v in tensors.items()},
                "torch.bfloat16; rounding would change the weights",
            ),
        ):
            torch.save(content, path)
            with self.subTest(message), self.assertRaisesRegex(ValueError, "(?s)" + message):
                convert.load("convnext_n", path, **KWARGS)
        torch.save(tensors, path)
        path.write_bytes(path.read_bytes()[:-9000])
        with self.assertRaisesRegex(ValueError, "not a complete PyTorch file"):
            files.read(path)

    def test_without_torch(self):
        path = self.folder / "weights.pth"
        path.write_bytes(b"PK\x03\x04")
        with (
            hidden("torch"),
            self.assertRaisesRegex(ValueError, r"pip install 'jaxrobust\[torch\]'"),
        ):
            files.read(path)


class MetaNamesTest(absltest.TestCase):
    def test_convnext(self):
        """timm's weights under the names of Meta's repository (Liu et al. 2022): one network."""
        theirs = as_timm(random_weights())
        meta = {}
        for key, array in theirs.items():
            parts = key.split(".")
            if parts[0] == "stem":
                key = f"downsample_layers.0.{parts[1]}.{parts[2]}"
            elif parts[0] == "head":
                key = key.replace("head.norm", "norm").replace("head.fc", "head")
            elif parts[2] == "downsample":
                key = f"downsample_layers.{parts[1]}.{parts[3]}.{parts[4]}"
            else:
                key = f"stages.{parts[1]}.{'.'.join(parts[3:])}"
                key = key.replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")
            meta[key] = array
        ours = convert.from_torch("convnext_n", theirs, **KWARGS)
        again = convert.from_torch("convnext_n", meta, **KWARGS)
        jax.tree.map(np.testing.assert_array_equal, ours, again)
