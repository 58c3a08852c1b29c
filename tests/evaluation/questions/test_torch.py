"""`evaluate --torch`: a module of a file or a `.pt2`, its record, and every refusal."""

import contextlib
import importlib.metadata
import json
import tempfile
from pathlib import Path

import pytest
from absl.testing import parameterized

from tests.support import paths, result_lines, sweeps
from tests.support.evaluations import call
from tests.support.outcomes import ended, refused

torch = pytest.importorskip("torch", reason=paths.PARITY)

FAULTS = Path(__file__).parents[2] / "support" / "torch_faults.py"
MORE = """

def linear():
    return Linear().eval()


def convolutional(width=8, channels=1):
    return Convolutional(width, channels).eval()


def of_width(width):
    return Convolutional(width, 1).eval()


def softmax():
    return Softmax().eval()


def named():
    return Named().eval()


def training():
    return Linear()


def random():
    return Random().eval()


def thermometer():
    return Thermometer().eval()


def of_colours():
    return of_larger_images().eval()


def broken():
    raise RuntimeError("no such checkpoint")


def arrays():
    return Linear().state_dict()


ready = Linear().eval()
"""


class TorchTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.enterClassContext(
            contextlib.chdir(cls.enterClassContext(tempfile.TemporaryDirectory()))
        )
        source = FAULTS.read_text().replace(
            "SIDE, CHANNELS = 10, 8, 3", "SIDE, CHANNELS = 10, 8, 1"
        )
        Path("nets.py").write_text(source + MORE)
        Path("net.pt2").write_text("no archive")
        Path("net.pt").write_bytes(b"\x80\x04")

    def asked(self, **flags):
        few = {"dataset": "digits", "epsilon": "0.05", "attack": "apgd-ce", "n": 20}
        return call(
            **(few | {k: json.dumps(v) if type(v) is dict else v for k, v in flags.items()})
        )

    def test_a_function_of_a_file(self):
        out = Path(tempfile.mkdtemp(dir="."))
        few = {"torch": "nets.py:convolutional", "torch_args": {"width": 6}, "steps": 3}
        printed, said = ended(self.asked(out=str(out), **few))
        self.assertRegex(said, r"JAX and PyTorch agree on 8 images")
        self.assertRegex(
            said, r"of the clean images correctly; .* jaxrobust doctor --torch nets\.py:conv"
        )
        (record,) = result_lines.read(out)
        source = record["function"]
        self.assertEqual(source["name"], "nets.py:convolutional")
        self.assertEqual(source["torch"], importlib.metadata.version("torch"))
        self.assertEqual(source["arguments"], {"width": 6})
        self.assertLen(source["sha256"], 64)
        self.assertEqual(self.asked(out=str(out), **few)[1], printed)  # it is there
        self.assertLen(result_lines.read(out), 1)

    def test_files(self):
        linear, x = self.linear(), torch.zeros(2, 1, 8, 8)
        torch.jit.save(torch.jit.trace(linear, x), "traced.pt")
        sizes = ({0: torch.export.Dim("batch")},)
        torch.export.save(torch.export.export(linear, (x,), dynamic_shapes=sizes), "exported.pt2")
        for name in ("traced.pt", "exported.pt2"):
            out = Path(tempfile.mkdtemp(dir="."))
            ended(self.asked(out=str(out), torch=name, attack="clean", epsilon=None))
            (record,) = result_lines.read(out)
            self.assertEqual(record["function"]["name"], name)

    def linear(self):
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).eval()

    def test_without_gradients_an_attack_that_needs_none(self):
        out = Path(tempfile.mkdtemp(dir="."))
        few = {"torch": "nets.py:thermometer", "attack": "square", "steps": 20}
        _, said = ended(self.asked(out=str(out), **few))
        self.assertRegex(said, "no gradient reaches the images .*; only gradient-free attacks")
        self.assertLen(result_lines.read(out), 1)

    def test_randomness_that_is_meant(self):
        out = Path(tempfile.mkdtemp(dir="."))
        few = {"torch": "nets.py:random", "version": "rand", "steps": 2, "n": 8, "draws": 2}
        printed, said = ended(self.asked(out=str(out), **few))
        self.assertRegex(said, r"it draws random numbers in 1 places, from a key for each image")
        (record,) = result_lines.read(out)
        self.assertRegex(record["method"], "^apgd-ce, rand")
        self.assertEqual(self.asked(out=str(out), **few)[1], printed)  # keys are derived, not drawn

    @pytest.mark.slow
    def test_bfloat16_searches(self):
        out = Path(tempfile.mkdtemp(dir="."))
        few = {"torch": "nets.py:ready", "steps": 3, "search_dtype": "bfloat16"}
        self.asked(out=str(out), **few)
        (record,) = result_lines.read(out)
        self.assertEqual(record["search_dtype"], "bfloat16")

    @sweeps.rows(
        (
            {"torch": "nets.py:of_width"},
            r"argument: 'width'; .*--torch_args '\{\"width\": \"\.\.\.\"\}'",
        ),
        ({"torch": "nets.py:of_width", "torch_args": {"depth": 2}}, "--torch_args"),
        ({"torch": "nets.py:ready", "torch_args": {"a": 1}}, "is a module; leave --torch_args out"),
        ({"torch": "nets.py:named"}, r"name the logits \[B,K\] with --torch_output NAME"),
        ({"torch": "nets.py:training"}, r"--torch=nets\.py:training: it .*call module\.eval"),
        ({"torch": "nets.py:random"}, r"nets\.py, line \d+ .*draws random numbers"),
        (
            {"torch": "nets.py:thermometer"},
            r"no gradient reaches the images .*, so apgd-ce would find nothing .*--attack=square",
        ),
        (
            {"torch": "nets.py:of_colours"},
            r"images are \[B,1,8,8\], and its 0, Conv2d.* fails .*; the module .* \[B,3,32,32\]",
        ),
        ({"torch": "nets.py:quantised"}, r"its weights are quantized, .* give the float module"),
        ({"torch": "nets.py:random"}, r"give --version=rand"),
        (
            {"torch": "nets.py:random", "version": "rand", "bundle": "bundle"},
            "--bundle needs a deterministic network, not --version=rand",
        ),
        ({"torch": "nets.py:broken"}, r"nets\.py, line \d+: RuntimeError: no such checkpoint"),
        ({"torch": "nets.py:arrays"}, "it is a state dict, not a torch.nn.Module"),
        ({"torch": "nets.py:nothing"}, "has no 'nothing'; it has .*convolutional"),
        ({"torch": "nets.py"}, "does not name a function"),
        ({"torch": "net.pt"}, "holds weights or a pickle, .* is not opened"),
        ({"torch": "net.safetensors"}, "The function must load"),
        ({"torch": "nonet.pt2"}, "there is no such file"),
        ({"torch": "net.pt2"}, "torch.export.load cannot read it with PyTorch"),
        ({"torch": "net.pt2", "torch_args": {"a": 1}}, "does not accept arguments"),
        ({"torch": "nets.py:ready", "dataset": None}, "--torch needs --dataset NAME"),
        ({"torch": "nets.py:ready", "model": "convnext_n"}, "give --workdir RUN"),
        ({"torch": "nets.py:ready", "workdir": "a"}, "--workdir and --torch name .* to --out DIR"),
        ({"torch": "nets.py:ready", "phase": "train"}, "--phase has no effect with --torch"),
        (
            {"function": "nets.py:ready", "torch_args": {"a": 1}},
            "without --torch, leave --torch_args out",
        ),
        ({"torch": "nets.py:ready", "dataset": "fake:8x8x1:7"}, "returns 10 logits, .* 7 classes"),
    )
    def test_refuses(self, flags, message):
        said = refused(self.asked(**flags))
        (said,) = [line for line in said.splitlines() if line.startswith("jaxrobust: ")]
        self.assertRegex(said, message)

    @pytest.mark.slow
    def test_softmax_is_in_doubt(self):
        out = Path(tempfile.mkdtemp(dir="."))
        self.asked(torch="nets.py:softmax", out=str(out), steps=3)
        (record,) = result_lines.read(out)
        self.assertIn("softmax", " ".join(record["flags"].values()))
