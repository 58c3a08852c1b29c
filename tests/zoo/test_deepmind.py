"""Networks of RobustBench's classes: golden logits of small ones, and of every id its own class."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxrobust import models
from jaxrobust.models.published import LEADERBOARDS, PUBLISHED
from jaxrobust.weights.naming import convert
from tests.support import cifar_study, golden32, parity, paths, sweeps

# Logits f64[2,10] of robustbench 1.1.1's classes (torch 2.13, float64) for images of seed 5, with
# weights drawn by their names. Label -> our network, its options, the table whose mean and std the
# class holds, and the id whose renaming its files have.
GOLDEN = {
    "dm_wide_resnet": (
        *("dm_wrn_28_10", {"depths": (2, 2, 2), "channels": (32, 64, 128)}),
        *("cifar100", "cifar100/Linf/Wang2023Better_WRN-28-10"),
    ),
    "ra_wide_resnet": (
        *("ra_wrn_70_16", {"depths": (2, 1, 2), "channels": (16, 24, 40), "stem": 12}),
        *("cifar10", "Peng2023Robust"),
    ),
    "trades": (
        *("wrn_34_10", {"depths": (2, 2, 2), "widths": (2, 2, 2)}),
        *(None, "cifar100/Linf/Sehwag2021Proxy"),
    ),
    "ra_resnet": (
        *("ra_wrn_101_2", {"depths": (2, 1), "channels": (16, 24), "stem": 8}),
        *("imagenet", "imagenet/Linf/Peng2023Robust"),
    ),
    "mimir": (
        *("swin_l_mimir", {"dim": 8, "depths": (2, 2, 1), "heads": (1, 2, 4), "patch": 2}),
        *(None, "Xu2024MIMIR_Swin-L"),
    ),
}
OWN = {"mimir": {"window": 4}}  # a map of 16, of 8, and of 4: one window
# One id of each network and number of classes; the others have the same class.
CLASSES = {
    (net.model, net.board.num_classes): key
    for key, net in reversed(PUBLISHED.items())
    if models.family(net.model).file in ("dm_wide_resnet", "dm_preact_resnet", "ra_resnet")
    or net.model in ("wrn_34_10", "resnet18_32px", "swin_b_mimir", "swin_l_mimir")
}
# What classes hold next to weights.
MADE = ("relative_position_index", "attn_mask", "normalization.mean", "normalization.std")
# Parameters of RobustBench's classes with 10 classes, ImageNet's with 1000.
COUNTED = {
    "dm_preactresnet18": 12_548_426,
    "dm_wrn_28_10": 36_479_194,
    "dm_wrn_34_10": 46_160_474,
    "dm_wrn_34_20": 184_531_674,
    "dm_wrn_70_16": 266_796_506,
    "dm_wrn_82_8": 79_125_466,
    "dm_wrn_94_16": 365_915_610,
    "dm_wrn_106_16": 415_475_162,
    "ra_wrn_70_16": 267_240_802,
    "ra_wrn_101_2": 104_065_776,
    "wrn_34_10": 46_160_474,
    "resnet18_32px": 11_173_962,
    "swin_b_mimir": 87_768_224,
    "swin_l_mimir": 196_794_556,
}


@functools.cache
def stored():
    return json.loads((paths.GOLDEN / "models" / "robustbench_small.json").read_text())


def normalised(arrays, board: str | None, dtype):
    """The mean and std that a class holds and its files do not, as PyTorch rounds them."""
    if board is None:
        return arrays
    table = LEADERBOARDS[board]
    pair = {"normalize.mean": table.mean, "normalize.std": table.std}
    rounded = {k: np.float32(v).reshape(1, 3, 1, 1).astype(dtype) for k, v in pair.items()}
    return arrays | rounded


def theirs_of(key: str, name: str, **options) -> list[str]:
    """The names in the files of an id."""
    names = models.torch_keys(name, **options)
    for old, new in PUBLISHED[key].renamed:
        names = [each.replace(old, new) for each in names]
    for part, copy in [PUBLISHED[key].unused] if PUBLISHED[key].unused else []:
        copied = [each for each in names if each.startswith(part)]
        end = names.index(copied[-1]) + 1
        names[end:end] = [each.replace(part, copy) for each in copied]
    return names


class GoldenTest(parameterized.TestCase):
    @sweeps.fast("dm_wide_resnet", "trades")
    @parameterized.parameters(*GOLDEN)
    def test_logits(self, label):
        name, options, board, key = GOLDEN[label]
        row = stored()[label]
        drawn = {
            k: golden32.drawn(k, tuple(shape))
            for k, shape in zip(row["names"], row["shapes"], strict=True)
            if not k.endswith(MADE)
        }
        (classes,) = [*drawn.values()][-1].shape
        own = OWN.get(label, {}) | {"num_classes": classes}
        self.assertEqual(sorted(drawn), sorted(theirs_of(key, name, **options)))
        x = np.random.default_rng(5).random((2, 3, 32, 32)).transpose(0, 2, 3, 1)
        expected = np.array(row["logits"])
        for dtype, bound in (("float32", 1e-6), ("float64", 1e-9)):
            with jax.enable_x64(dtype == "float64"):
                arrays = {
                    k: a.astype(dtype) if a.dtype.kind == "f" else a for k, a in drawn.items()
                }
                arrays = normalised(arrays, board, dtype)
                net, params, stats = golden32.network(name, arrays, dtype, **options | own)
                self.assertEqual(sum(p.size for p in params.values()), row["parameters"])
                logits = jax.jit(net.apply)(params, stats, jnp.asarray(x.astype(dtype)))[0]
            off = np.abs(np.asarray(logits)[:, :10] - expected).max()
            self.assertLess(off / np.abs(expected).max(), bound, dtype)


class CountsTest(absltest.TestCase):
    def test_every_network_of_the_ids_is_counted(self):
        """What the table ships; that it is what networks have: tests/models/test_table.py."""
        from jaxrobust.models.table import COUNTED as SHIPPED

        self.assertEqual({name for name, _ in CLASSES}, COUNTED.keys())
        self.assertEqual({name: SHIPPED[name][0] for name in COUNTED}, COUNTED)


class MessageTest(parameterized.TestCase):
    @sweeps.rows(
        ("dm_wrn_28_10", {"depths": (2, 1)}, r"channels=.* and depths=\(2, 1\) must have the same"),
        ("dm_wrn_28_10", {"channels": (0, 1, 2)}, "must be a tuple of positive integers"),
        ("dm_wrn_28_10", {"channels": (8, 8, 16)}, "a stage that halves the map needs a project"),
        (
            *("dm_wrn_28_10", {"activation": "swish"}),
            "activation='swish' is unknown; choose one of relu, si",
        ),
        ("dm_wrn_28_10", {"stem": 0}, "stem=0 must be at least 1"),
        ("dm_wrn_28_10", {"bn_momentum": 0.0}, "bn_momentum=0.0 must be above 0 and at most 1"),
        ("ra_wrn_70_16", {"se_ratio": -0.5}, "se_ratio=-0.5 must be at least 0"),
        (
            *("ra_wrn_70_16", {"se_ratio": 0.01, "channels": (8, 16, 32)}),
            "se_ratio=0.01 leaves 8 channels without a hidden unit; use at least 0.125",
        ),
        ("dm_preactresnet18", {"depths": ()}, r"depths=\(\) must be a tuple of positive integers"),
        ("dm_preactresnet18", {"width": 0}, "width=0 must be at least 1"),
        ("dm_preactresnet18", {"image_size": 4}, "the map is halved 3 times, so use at least 8"),
        ("dm_wrn_28_10", {"image_size": 30}, "halve evenly 2 times, so use 28 or 32"),
    )
    def test_message(self, name, changes, message):
        cifar_study.check_message(self, name, changes, message)


def needs_robustbench(test):
    parity.torch_or_skip(test)
    from jaxrobust.publish import torch_networks

    try:
        torch_networks.import_robustbench()
    except ImportError as error:
        test.skipTest(str(error))
    return torch_networks


class RobustbenchTest(parameterized.TestCase):
    """Its own classes, next to which ours is with random weights and statistics."""

    @pytest.mark.slow
    def test_every_id_has_the_class_and_the_names(self):
        torch_networks = needs_robustbench(self)
        import torch

        printed: dict[tuple, str] = {}
        counted: dict[tuple, int] = {}
        for key, net in PUBLISHED.items():
            if (net.model, net.board.num_classes) not in CLASSES or net.model.startswith("swin"):
                continue  # Swin measures its maps while it is made
            kind = (net.model, net.board.num_classes, str(net.options), net.unused, net.buffers)
            with torch.device("meta"):
                theirs = torch_networks.published(key)
            names = theirs_of(key, net.model, **net.options)
            inside = {*(net.buffers or ())}  # buffers of modules inside come last
            stored = [name for name in theirs.state_dict() if name not in inside]
            self.assertEqual((stored, inside - theirs.state_dict().keys()), (names, set()), key)
            unused = net.unused[1:] or ("nothing",)
            parameters = sum(
                p.numel() for name, p in theirs.named_parameters() if not name.startswith(unused)
            )
            if kind not in counted:
                sizes = {"num_classes": kind[1], "image_size": net.board.image_size}
                counted[kind] = parity.parameters(net.model, **sizes, **net.options)
            self.assertEqual(parameters, counted[kind], key)
            # Swish and SiLU are printed differently, and are one function.
            words = str(theirs).replace("Swish", "SiLU").partition("(")[2]
            self.assertEqual(printed.setdefault(kind, words), words, key)

    @parameterized.parameters(*sorted(CLASSES.items()))
    @pytest.mark.matrix
    def test_logits(self, kind, key):
        torch_networks = needs_robustbench(self)
        import torch

        name, classes = kind
        torch.manual_seed(0)
        theirs = torch_networks.published(key).eval()
        state = {
            k: v if k.endswith(MADE) else torch.from_numpy(golden32.drawn(k, tuple(v.shape)))
            for k, v in theirs.state_dict().items()
        }
        theirs.load_state_dict(state)
        arrays = {k: v.numpy() for k, v in state.items()}
        net, side = PUBLISHED[key], PUBLISHED[key].board.image_size
        x = np.random.default_rng(0).random((1, 3, side, side), np.float32)
        if net.buffers == ():
            arrays = normalised(arrays, net.dataset, np.float32)
            theirs.mean, theirs.std = theirs.mean.double(), theirs.std.double()
        with torch.no_grad():
            expected = theirs.double()(torch.from_numpy(x).double()).numpy()
        del theirs
        options = {"num_classes": classes, "image_size": side}
        if "scan" in models.variant(name)._fields:
            options["scan"] = True
        params, stats = convert.from_torch(name, arrays, **options)
        back = convert.to_torch(name, params, stats, layout=key)
        self.assertEqual(back.keys(), state.keys())
        for k, array in back.items():
            np.testing.assert_array_equal(array, state[k].numpy(), k)
        del back, state, arrays
        for dtype, bound in (("float32", 1e-6), ("float64", 1e-9)):
            with jax.enable_x64(dtype == "float64"):
                weights = jax.tree.map(lambda a, d=dtype: jnp.asarray(a, d), (params, stats))
                net = models.create(name, dtype=dtype, **options)
                images = jnp.asarray(x.transpose(0, 2, 3, 1), dtype)
                logits = np.asarray(jax.jit(net.apply)(*weights, images)[0])
            off = np.abs(logits - expected).max() / np.abs(expected).max()
            print(f"{key}, {dtype}: {off:.2e}")
            self.assertLess(off, bound, f"{key}, {dtype}")
