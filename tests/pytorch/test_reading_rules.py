"""Rules by which modules of PyTorch's are read: what draws, what is refused, what stays quiet."""

import logging
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxrobust.pytorch import agreement
from jaxrobust.pytorch.program import Of, OperatorCall
from jaxrobust.pytorch.reading import exporting, refusals, steps
from jaxrobust.pytorch.reading.wrappers import quietly
from tests.support import paths, sweeps

torch = pytest.importorskip("torch", reason=paths.PARITY)


def node(target="", *args, op="call_function", **kwargs):
    return SimpleNamespace(op=op, target=target, args=args, kwargs=kwargs)


class DrawingTest(absltest.TestCase):
    def test_what_draws(self):
        for name in (
            *("rand", "randn_like", "randint", "normal_", "log_normal", "cauchy", "geometric"),
            *("multinomial", "exponential", "uniform", "native_dropout", "bernoulli", "poisson"),
        ):
            self.assertTrue(refusals.is_draw(f"aten.{name}.default"), name)
        for name in ("add", "layer_norm", "linalg_vector_norm", "expand", "grand", "batch_norm"):
            self.assertFalse(refusals.is_draw(f"aten.{name}.default"), name)

    def test_a_random_slope_is_drawn_in_training_alone(self):
        rrelu = "aten.rrelu_with_noise.default"
        for training in (True, False):
            one = node("rrelu", "x", "noise", 0.1, 0.3, training)
            self.assertEqual(steps.is_drawing(one, rrelu), training)
        self.assertFalse(steps.is_drawing(node("rrelu", "x"), rrelu))

    def test_attention_that_drops(self):
        name = "aten.scaled_dot_product_attention.default"
        for args, kwargs, drops in (
            ((), {}, False),
            ((None, 0.1), {}, True),
            ((None, 0.0), {}, False),
            ((), {"dropout_p": 0.1}, True),
            ((), {"dropout_p": 0.0}, False),
            ((None, 0.5), {"op": "placeholder"}, False),
        ):
            one = node(name, "q", "k", "v", *args, **kwargs)
            self.assertEqual(exporting.drops_attention(one), drops)
        self.assertFalse(exporting.drops_attention(node("aten.mm.default", 1, 2, 3, 4, 0.5)))

    def test_given_draws_are_all_taken_in_their_order(self):
        draws = [np.full(3, 2.0, np.float32), np.full((2, 1), 5.0, np.float32)]
        with agreement.injected(draws):
            first, second = torch.rand(3), torch.randn(2, 1)
        self.assertEqual((first.tolist(), second.tolist()), ([2, 2, 2], [[5], [5]]))
        for program_draws, count, message in (
            (draws, 3, "draws 1 times, but its program draws 2 times"),
            (draws, 4, r"draws numbers of shape \(4,\) .* but its program draws \(3,\)"),
            ([], 3, r"shape \(3,\) .* draws no more"),
        ):
            with (
                self.assertRaisesRegex(ValueError, message),
                agreement.injected(program_draws),
            ):
                torch.rand(count)


class RefusalsTest(parameterized.TestCase):
    @sweeps.rows(
        ("aten.bincount.default", "bincount returns as many counts as its largest number"),
        ("aten.nonzero.default", "how many values nonzero returns depends on the images"),
        ("aten._unique2.default", "how many values _unique2 returns depends on the images"),
        ("aten.masked_select.default", "how many values masked_select returns"),
        ("aten._local_scalar_dense.default", "a number or a size is read from tensor values"),
        ("aten.item.default", "a number or a size is read from tensor values"),
        ("sym_max", "a number or a size is read from tensor values"),
        ("quantized.linear.default", "quantized.linear.default has quantized weights; give the"),
        ("aten.dequantize.self", "aten.dequantize.self has quantized weights; give the"),
        ("cond", "torch.cond chooses a function depending on the images"),
        ("aten.lgamma.default", "the PyTorch operator aten.lgamma.default is not supported"),
    )
    def test_why_there_is_no_row(self, name, reason):
        self.assertStartsWith(refusals.no_row("net.py, line 3", name), f"net.py, line 3: {reason}")

    def test_the_innermost_line_of_ones_own(self):
        frames = [
            ("/made/up/main.py", 9, "net(x)"),
            ("/made/up/net.py", 5, "y = F.relu(x)"),
            (f"{Path(torch.__file__).parent}/nn/functional.py", 1, "return"),
            ("<eval_with_key>.3", 2, "relu"),
        ]
        text = "\n".join(f'  File "{f}", line {n}, in f\n    {code}' for f, n, code in frames)
        self.assertEqual(refusals.own_line(text), "/made/up/net.py, line 5 (y = F.relu(x))")
        self.assertEqual(refusals.own_line('File "/me/a.py", line 4'), "/me/a.py, line 4")
        self.assertEqual(refusals.own_line("nothing of it"), "")

    def test_a_module_of_one_image_at_a_time_is_taken(self):
        class One(torch.nn.Module):
            def forward(self, x):
                return x.reshape(1, -1)[:, :4] + torch.zeros(len(x), 1).reshape(1, 1)

        refusals.check_takes(One(), (8, 8, 3))

    def test_a_gradient_in_one_image_is_enough(self):
        def bright(x):
            return torch.relu(x.mean((2, 3)) - 0.5)

        images = np.stack([np.full((2, 2, 3), value, np.float32) for value in (0.2, 0.8)])
        self.assertEqual(refusals.without_gradient(bright, images, ["apgd-ce"]), "")
        with self.assertRaisesRegex(ValueError, "so apgd-ce would find nothing"):
            refusals.without_gradient(bright, images[:1], ["apgd-ce"])

    def test_autocast_that_is_off_is_nothing(self):
        class Cast(torch.nn.Module):
            def __init__(self, enabled):
                super().__init__()
                self.enabled = enabled

            def forward(self, x):
                with torch.autocast("cpu", torch.bfloat16, enabled=self.enabled):
                    return x.mean((2, 3))

        before = torch.autocast.__enter__
        refusals.check_takes(Cast(False), (8, 8, 3))
        with self.assertRaisesRegex(ValueError, "torch.autocast inside it computes in bfloat16"):
            refusals.check_takes(Cast(True), (8, 8, 3))
        self.assertIs(torch.autocast.__enter__, before)


class CheckTest(parameterized.TestCase):
    def test_dropout_may_train_where_draws_are_meant_and_norms_may_not(self):
        drops, norms = torch.nn.Dropout(0.5).train(), torch.nn.BatchNorm2d(3).train()
        exporting.check(drops, random=True)
        for module, random in ((drops, False), (norms, True), (norms, False)):
            with self.assertRaisesRegex(ValueError, "module is in training mode; call module.eval"):
                exporting.check(module, random=random)

    def test_programs_of_any_number_of_images_and_of_one(self):
        def loaded(*shapes):
            nodes = [node(op="placeholder") for _ in shapes] + [node()]
            for placeholder, shape in zip(nodes, shapes, strict=False):
                placeholder.meta = {"val": SimpleNamespace(shape=shape)}
            program = SimpleNamespace(graph=SimpleNamespace(nodes=nodes))
            with mock.patch.object(torch.export, "load", lambda path: program):
                return exporting.loaded(Path("a.pt2"))[1]

        self.assertFalse(loaded((5,), ("batch", 3, 4, 4)))
        self.assertTrue(loaded((1, 3, 4, 4)))
        for shapes, message in (
            ([("batch", 3, 4, 4), ("batch", 48)], r"^it expects \('batch', 48\), not images"),
            ([], r"^it expects \(\), not images"),
            ([(2, 3, 4, 4)], "^it only accepts 2 images at a time; export it with"),
            ([(0, 3, 4, 4)], "^it only accepts 0 images"),
        ):
            with self.assertRaisesRegex(ValueError, message):
                loaded(*shapes)

    def test_the_type_of_weights_is_one(self):
        float32, float64 = torch.zeros(1), torch.zeros(1, dtype=torch.float64)
        whole = torch.zeros(1, dtype=torch.int64)
        self.assertEqual(steps._dtype({"a": float64, "n": whole}), "float64")
        self.assertEqual(steps._dtype({"n": whole}), "float32")
        with self.assertRaisesRegex(ValueError, "several types .torch.float32, torch.float64.$"):
            steps._dtype({"a": float64, "b": float32})

    def test_one_weight_under_two_names_is_one_array(self):
        weight = torch.arange(6.0).reshape(2, 3)
        same = {"a": "x", "b": "y", "c": "z"}
        tensors = {"x": weight, "y": weight, "z": weight.t()}
        names, arrays = steps.shared(same, tensors)
        self.assertEqual(names, {"a": "x", "b": "x", "c": "z"})
        np.testing.assert_array_equal(arrays["z"], weight.t())
        self.assertEqual(sorted(arrays), ["x", "z"])
        square = torch.arange(4.0).reshape(2, 2)  # turned, of one shape and one place
        names, _ = steps.shared({"a": "x", "b": "y"}, {"x": square, "y": square.t()})
        self.assertEqual(names, {"a": "x", "b": "y"})

    def test_doubles_are_those_of_the_weights_type_alone(self):
        weights = {"w": torch.ones(2), "h": torch.ones(2).half(), "i": torch.ones(2).int()}
        wide = steps.Free(weights, {"c": torch.ones(1)}, "float32", double=True).values
        kinds = {name: str(value.dtype).removeprefix("torch.") for name, value in wide.items()}
        self.assertEqual(kinds, {"c": "float64", "w": "float64", "h": "float16", "i": "int32"})
        self.assertEqual(steps.Free(weights, {}, "float32").values["w"].dtype, torch.float32)


class ScriptedTest(absltest.TestCase):
    def test_files_of_torchscript(self):
        folder = Path(self.create_tempdir())
        for name, inside, expected in (
            ("a.pt", "net/code/__torch__.py", True),
            ("b.pt", "net/data.pkl", False),
            ("c.pt", "codes.txt", False),
        ):
            with zipfile.ZipFile(folder / name, "w") as archive:
                archive.writestr(inside, "")
            self.assertEqual(exporting.is_torchscript(folder / name), expected, name)
        (folder / "d.pt").write_bytes(b"/code/")
        self.assertFalse(exporting.is_torchscript(folder / "d.pt"))
        self.assertFalse(exporting.is_torchscript(folder / "none.pt"))

    def test_a_copy_in_float64_leaves_the_module_as_it_is(self):
        module = torch.nn.Linear(2, 2)
        self.assertEqual(exporting.in_float64(module).weight.dtype, torch.float64)
        self.assertEqual(module.weight.dtype, torch.float32)

    def export(self, *outcomes):
        """What is made of a module of which PyTorch writes so many images, or raises."""
        left, given = list(outcomes), []

        class Converter:
            def __init__(self, module, examples):
                (example,) = examples
                given.append(tuple(example.shape))

            def convert(self):
                outcome = left.pop(0)
                if isinstance(outcome, Exception):
                    raise outcome
                nodes = [
                    SimpleNamespace(name=name, meta={"val": torch.zeros(1)})
                    for name in ("w", "out")
                ]
                shape = SimpleNamespace(shape=(outcome, 3, 4, 5))
                nodes.insert(1, SimpleNamespace(name="x", meta={"val": shape}))
                signature = SimpleNamespace(user_inputs=("x",))
                graph = SimpleNamespace(nodes=nodes)
                return SimpleNamespace(graph_signature=signature, graph=graph, of=outcome)

        there = SimpleNamespace(TS2EPConverter=Converter)
        with mock.patch.dict("sys.modules", {"torch._export.converter": there}):
            program, single = exporting.exported_torchscript(torch.nn.Identity(), (4, 5, 3))
        return program.of, single, given

    def test_a_module_is_written_down_for_any_number_of_images_or_for_one(self):
        two, one = (2, 3, 4, 5), (1, 3, 4, 5)
        self.assertEqual(self.export("any"), ("any", False, [two]))
        self.assertEqual(self.export(2, 1), (1, True, [two, one]))
        self.assertEqual(self.export(RuntimeError("no"), 1), (1, True, [two, one]))
        first, second = RuntimeError("first\nand more"), RuntimeError("second")
        said = r"^it is a TorchScript module \(Identity\) that .* made from \(first\)$"
        with self.assertRaisesRegex(ValueError, said):
            self.export(first, second)
        with self.assertRaisesRegex(ValueError, r"made from \(second\)$"):
            self.export(2, second)
        none = mock.patch.dict("sys.modules", {"torch._export.converter": None})
        with (
            none,
            self.assertRaisesRegex(ValueError, "^it is a TorchScript module .* it was made from$"),
        ):
            exporting.exported_torchscript(torch.nn.Identity(), (4, 5, 3))

    def test_the_logits_among_results(self):
        result = {"a": [1, (2, SimpleNamespace(logits=3))], "0": 4}
        for path, expected in (("", result), ("a.0", 1), ("a.1.0", 2), ("a.1.1.logits", 3)):
            self.assertEqual(steps.chosen(result, path), expected)
        self.assertEqual(steps.chosen(result, "0"), 4)


class SilenceTest(absltest.TestCase):
    def test_what_was_quiet_before_stays_so(self):
        before = logging.root.manager.disable
        self.addCleanup(logging.disable, before)
        for level in (logging.NOTSET, logging.INFO):
            logging.disable(level)
            with self.assertRaises(KeyError), quietly():
                self.assertEqual(logging.root.manager.disable, logging.CRITICAL)
                warnings.warn("of PyTorch's", stacklevel=1)  # else it would be an error here
                raise KeyError
            self.assertEqual(logging.root.manager.disable, level)


class MasksTest(parameterized.TestCase):
    """Only one number may be put where a mask of images is: all else has unknown sizes."""

    @sweeps.rows(
        ({}, True),
        ({"shape": (2,)}, False),
        ({"indices": (Of("m"), Of("m"))}, False),
        ({"value": 1.0}, False),
        ({"operator": "aten.index.Tensor"}, False),
    )
    def test_masks_of_images(self, case, allowed):
        values = {"m": torch.zeros(2, dtype=torch.bool), "v": torch.zeros(case.get("shape", ()))}
        nodes = {name: SimpleNamespace(name=name, meta={"val": v}) for name, v in values.items()}
        operands = Of("x"), case.get("indices", (Of("m"),)), case.get("value", Of("v"))
        operator = case.get("operator", "aten.index_put.default")
        step = OperatorCall("out", operator, operands, {}, "net.py:3")
        if allowed:
            self.assertEqual(steps.with_places(step, nodes, {}), step)
            return
        with self.assertRaisesRegex(ValueError, "^net.py:3: a mask .*use torch.where"):
            steps.with_places(step, nodes, {})
