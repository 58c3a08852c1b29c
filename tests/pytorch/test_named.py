"""Networks in PyTorch that a command line names: what is built, refused, and said of them."""

import hashlib
import types
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxrobust.pytorch import agreement, named
from jaxrobust.pytorch import torch as conversion
from jaxrobust.pytorch.agreement import Agreement
from jaxrobust.pytorch.named import Built
from jaxrobust.pytorch.networks import torch_modules as modules
from jaxrobust.pytorch.reading import exporting, refusals
from tests.support import paths, sweeps

torch = pytest.importorskip("torch", reason=paths.PARITY)

SOURCE = """
import torch

def make(width, depth=1, **more):
    net = torch.nn.Linear(width, depth)
    net.more = more
    return net.eval()

net = torch.nn.Identity()
"""


class ArgumentsTest(absltest.TestCase):
    """What the function behind `torch:NAME` is called with."""

    def setUp(self):
        super().setUp()
        self.file = Path(self.create_tempdir()) / "my_nets.py"
        self.file.write_text(
            "import torch\n"
            "def sized(num_classes, in_channels, width=1, dims=()):\n"
            "    net = torch.nn.Linear(in_channels, num_classes)\n"
            "    net.given = width, dims\n"
            "    return net\n"
            "def plain(width=1):\n"
            "    return width\n"
            "def nothing(): pass\n"
        )
        self.sizes = {"num_classes": 7, "image_size": 32, "in_channels": 4}
        self.options = {"width": 3, "dims": [1, [2, 3]], modules.OUTPUT: "1"}

    def test_are_the_sizes_that_it_takes_and_the_options(self):
        given, own = self.sizes | self.options, {"width": 3, "dims": (1, (2, 3))}
        found = modules.arguments(f"torch:{self.file}:sized", given)
        self.assertEqual(found, {"num_classes": 7, "in_channels": 4} | own)
        self.assertEqual(modules.arguments(f"torch:{self.file}:plain", given), own)
        found = modules.arguments("torch:timm/resnet18", given)
        self.assertEqual(found, {"model_name": "resnet18", "num_classes": 7, "in_chans": 4} | own)

    def test_make_the_module_alike_each_time_and_leave_the_generator(self):
        name, given = f"torch:{self.file}:sized", self.sizes | self.options
        torch.manual_seed(5)
        before = torch.random.get_rng_state()
        first, second = (modules.module(name, given) for _ in range(2))
        self.assertTrue(torch.equal(torch.random.get_rng_state(), before))
        self.assertTrue(torch.equal(first.weight, second.weight))
        self.assertEqual((tuple(first.weight.shape), first.given), ((7, 4), (3, (1, (2, 3)))))
        torch.manual_seed(0)
        self.assertTrue(torch.equal(first.weight, torch.nn.Linear(4, 7).weight))

    def test_refusals(self):
        for function, given, said in (
            ("nothing", {}, "nothing returns nothing; return a torch.nn.Module"),
            ("plain", {"width": 2}, "plain returns a builtins.int; return"),
        ):
            with self.assertRaisesRegex(ValueError, f"model.name=torch:.*:{said}"):
                modules.module(f"torch:{self.file}:{function}", given)
        with self.assertRaisesRegex(ValueError, "torch:my_nets does not name a function; write"):
            modules.arguments("torch:my_nets", {})
        for missing, name, said in (
            ("torch", "torch:a.py:b", "needs PyTorch .*workdir holds the exported program"),
            ("timm", "torch:timm/resnet18", "needs timm: pip install timm"),
        ):
            there = modules.installed
            with (
                mock.patch.object(modules, "installed", lambda p, m=missing: p != m and there(p)),  # noqa: B023
                self.assertRaisesRegex(ValueError, f"model.name={name} {said}"),
            ):
                modules.module(name, self.sizes)


class BuiltTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = Path(self.create_tempdir())
        self.file = self.folder / "my_nets.py"
        self.file.write_text(SOURCE)

    def built(self, name, arguments=None, output=None, **how):
        return named.built("--torch", str(name), arguments, output, **how)

    def test_a_function_and_its_arguments(self):
        found = self.built(f"{self.file}:make", {"width": 3, "depth": 2, "x": 1}, "1", random=True)
        self.assertEqual((found.network.in_features, found.network.out_features), (3, 2))
        self.assertEqual(found.network.more, {"x": 1})
        self.assertEqual((found.single, found.output, found.random), (False, "1", True))
        record = {"arguments": {"width": 3, "depth": 2, "x": 1}, "output": "1"}
        self.assertEqual({k: v for k, v in found.record.items() if k != "torch"}, record)
        self.assertEqual(
            found.record["torch"].partition("+")[0], torch.__version__.partition("+")[0]
        )
        self.assertEqual(found.source.name, f"{self.file}:make")
        self.assertFalse(self.built(f"{self.file}:make", {"width": 3}).random)

    def test_the_module_itself(self):
        found = self.built(f"{self.file}:net")
        self.assertIsInstance(found.network, torch.nn.Identity)
        self.assertEqual(found.record["arguments"], {})
        with self.assertRaisesRegex(ValueError, "net is a module; leave --torch_args out"):
            self.built(f"{self.file}:net", {"a": 1})

    def test_arguments_that_are_missing_or_unknown(self):
        example = r"""give its arguments as --torch_args '{"width": "..."}'"""
        with self.assertRaisesRegex(ValueError, f"my_nets.py:make: missing .*'width'; {example}"):
            self.built(f"{self.file}:make")

    @parameterized.parameters(*named._WEIGHTS)
    def test_weights_are_not_opened(self, suffix):
        file = self.folder / f"net{suffix}"
        file.write_bytes(b"x")
        with self.assertRaisesRegex(ValueError, f"--torch=.*net{suffix} holds weights or a pickle"):
            self.built(file)

    def test_files_of_programs(self):
        file = self.folder / "net.pt2"
        with self.assertRaisesRegex(ValueError, "--torch=.*net.pt2: there is no such file"):
            self.built(file)
        file.write_bytes(b"program")
        with self.assertRaisesRegex(ValueError, "net.pt2 does not accept arguments; leave"):
            self.built(file, {"a": 1})
        with mock.patch.object(exporting, "loaded", lambda path: ("program", True)):
            found = self.built(file, output="x", random=True)
        self.assertEqual(found[:2], ("program", True))
        self.assertEqual((found.source.name, found.output, found.random), (str(file), "x", True))
        self.assertEqual(found.source.sha256, hashlib.sha256(b"program").hexdigest())
        with mock.patch.multiple(
            exporting,
            is_torchscript=lambda path: True,
            loaded_torchscript=lambda path: ("script", path.name),
        ):
            found = self.built(self.folder / "net.pt2")
        self.assertEqual(found[:2], (("script", "net.pt2"), False))

        def broken(path):
            raise ValueError("it is broken")

        with (
            mock.patch.object(exporting, "loaded", broken),
            self.assertRaisesRegex(ValueError, "^--torch=.*net.pt2: it is broken$"),
        ):
            self.built(file)

    def test_without_pytorch(self):
        with (
            mock.patch.object(
                named.importlib.metadata,
                "version",
                side_effect=named.importlib.metadata.PackageNotFoundError,
            ),
            self.assertRaisesRegex(
                ValueError, r"--torch needs PyTorch: pip install 'jaxrobust\[to"
            ),
        ):
            self.built(f"{self.file}:make", {"width": 3})


class InJaxTest(parameterized.TestCase):
    """The conversion and the comparison are stand-ins."""

    def said(self, *, seconds=(1.0, 1.0), blind="", random=False, draws=(), name="a.py:make"):
        program = types.SimpleNamespace(draws=draws)
        network = types.SimpleNamespace(logits_fn="fn", module="module", program=program)
        calls = {}

        def convert(kind):
            def converted(*args, **how):
                calls[kind] = (args, how)
                return network

            return converted

        agreed = Agreement(8, 1e-7, 1e-6, seconds, 16)
        source = types.SimpleNamespace(name=name)
        built = Built("net", True, source, {}, "out", random)
        images = np.zeros((8, 6, 5, 3), np.float32)
        lines: list[str] = []
        with (
            mock.patch.multiple(
                conversion, converted=convert("module"), of_exported=convert("program")
            ),
            mock.patch.object(
                agreement, "compared", lambda *given: calls.update(c=given) or agreed
            ),
            mock.patch.object(
                refusals, "without_gradient", lambda *given: calls.update(g=given) or blind
            ),
            mock.patch.object(named, "say", lines.append),
        ):
            found = named.in_jax("--torch", built, images, "rewrite", ("apgd-ce",))
        self.assertEqual(found, ("fn", 16))
        self.assertEqual(calls["c"][::2], (network, "rewrite"))
        self.assertEqual(calls["g"][::2], ("module", ("apgd-ce",)))
        how = {"output": "out", "random": random}
        if name.endswith(".pt2"):
            self.assertEqual(calls["program"], (("net",), {"single": True} | how))
        else:
            self.assertEqual(calls["module"], (("net", (6, 5, 3)), how))
        self.assertTrue(all(line.startswith(f"{name}: ") for line in lines), lines)
        return lines

    def test_what_is_said(self):
        (line,) = self.said()
        self.assertIn("JAX and PyTorch agree on 8 images", line)
        self.assertIn("batches of 16 cost less per image", line)
        self.assertLen(self.said(name="net.pt2"), 1)
        self.assertIn("b", self.said(blind="blind")[1])

    def test_draws(self):
        line = self.said(random=True, draws=("a", "b"))[1]
        self.assertIn("it draws random numbers in 2 places, from a key for each image", line)
        line = self.said(random=True)[1]
        self.assertIn("it does not draw random numbers; --version=standard is stronger", line)

    @sweeps.rows(
        ((1.19, 1.0), False),
        ((1.3, 1.0), True),
        ((0.3, 1.0), False),
        ((0.009, 0.001), False),  # too short to say anything
        ((0.011, 0.001), True),
    )
    def test_where_xla_is_slower(self, seconds, warns):
        lines = self.said(seconds=seconds)
        self.assertLen(lines, 1 + warns)
        if warns:
            self.assertIn(f"XLA takes {seconds[0] / seconds[1]:.1f} times as long", lines[1])

    def test_errors_name_the_flag_once(self):
        for text in ("it is not a module", "--torch=a.py:make: it is not a module"):
            with (
                self.assertRaisesRegex(ValueError, "^--torch=a.py:make: it is not a module$"),
                named._explained("--torch", "a.py:make"),
            ):
                raise ValueError(text)
