"""Blocks of PyTorch's modules, whose backward passes compute their values again."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from jaxrobust.pytorch import blocks, kept
from jaxrobust.pytorch import program as programs
from jaxrobust.pytorch import trainable as trained
from jaxrobust.runtime import pytorch
from tests.support import paths

torch = pytest.importorskip("torch", reason=paths.PARITY)
from jaxrobust.pytorch.reading.training_mode import blocks_of, trainable  # noqa: E402
from tests.support import trainable_modules as modules  # noqa: E402

IMAGE = (modules.SIDE, modules.SIDE, modules.CHANNELS)
NAMES = [f"stage{stage}.{at}" for stage in (1, 2) for at in range(3)]


@functools.cache
def written(depth=3, **options):
    torch.manual_seed(0)
    return trainable(modules.Blocks(depth=depth, **options), IMAGE)


class Odd(torch.nn.Module):
    """A block that may enlarge its map, or add the mean of its channels."""

    def __init__(self, width, padding=1, mean=False):
        super().__init__()
        self.conv = torch.nn.Conv2d(width, width, 3, padding=padding)
        self.norm = torch.nn.GroupNorm(1, width)
        self.out = torch.nn.Conv2d(width, width, 1)
        self.mean = mean

    def forward(self, x):
        y = self.out(torch.relu(self.norm(self.conv(x))))
        return y + y.mean(1, keepdim=True) if self.mean else y


class Pooled(torch.nn.Module):
    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, x):
        return self.head(x.mean((2, 3)))


def step(name, operator, *operands, **keywords):
    return programs.OperatorCall(name, operator, operands, keywords, "line 1")


class PartsTest(parameterized.TestCase):
    """Steps, written by hand: a sum of two maps, of which each is scaled."""

    def part(self, names="abc", read=("x", "y"), factor=2.0, results=("c",)):
        a, b, c = names
        of = programs.Of
        steps = (
            step(a, "mul", of(read[0]), factor, dtype=programs.NumberType("float32")),
            step(b, "mul", of(read[1]), of(read[0])),
            step(c, "cat", (of(a), of(b)), 1, alpha=of(read[1])),
        )
        return blocks.Part(steps=steps, results=frozenset(results), block="block")

    def test_what_is_needed(self):
        steps = self.part().steps
        for wanted, expected in (("c", "abc"), ("b", "b"), ("a", "a"), ("", ""), ("ab", "ab")):
            names = [step.name for step in programs.needed(steps, wanted)]
            self.assertEqual("".join(names), expected)

    def test_a_form_has_no_names(self):
        first = blocks.form(self.part())
        self.assertEqual((first.results, first.inputs), ({2}, ("x", "y")))
        (mul, operands, keywords), (_, second, _), (_, third, alpha) = first.operations
        self.assertEqual(mul, "mul")
        self.assertEqual(operands, (("input", 0), ("float", 2.0)))
        self.assertEqual(keywords, ((("str", "dtype"), ("float32", "type")),))
        self.assertEqual(second, (("input", 1), ("input", 0)))
        self.assertEqual(third, ((("step", 0), ("step", 1)), ("int", 1)))
        self.assertEqual(alpha, ((("str", "alpha"), ("input", 1)),))
        same = blocks.form(self.part("def", ("c", "w"), results=("f",)))
        self.assertEqual(same[:2], first[:2])
        self.assertEqual(same.inputs, ("c", "w"))
        for other in (
            self.part(factor=2),  # an int
            self.part(factor=3.0),
            self.part(results=("b", "c")),
            self.part(read=("x", "x")),
        ):
            self.assertNotEqual(blocks.form(other)[:2], first[:2])


class BlocksTest(parameterized.TestCase):
    @parameterized.parameters(
        (0.4, {"remat": True}),
        (0.4, {"scan": True}),
        (0.4, {"remat": True, "scan": True}),
        (0.0, {"remat": True, "scan": True}),
    )
    def test_values_and_gradients_are_the_same(self, dropout, settings):
        network, keys = written(2, dropout=dropout), jax.random.split(jax.random.key(1), 3)
        x = np.random.default_rng(0).random((3, *IMAGE))
        found = []
        with jax.enable_x64(True):
            for options in ({}, settings):
                net = trained.classifier(network, **options)
                params, stats = net.init(jax.random.key(0))
                params, stats = (
                    {name: jnp.asarray(a, jnp.float64) for name, a in group.items()}
                    for group in (params, stats)
                )

                def loss(params, x, net=net, stats=stats):
                    logits, after = net.apply(params, stats, x, train=True, key=keys)
                    return jnp.square(logits).sum(), (logits, after)

                run = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
                found.append(run(params, jnp.asarray(x)))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12), found[0], found[1]
        )
        moved = jax.device_get(found[1][1][1])
        self.assertEqual(moved["stage2.1.norm.num_batches_tracked"], 1)
        self.assertGreater(np.abs(moved["stage2.1.norm.running_mean"]).max(), 1e-3)

    def test_which_steps_are_of_a_block(self):
        network = written()
        for program in (network.training, network.evaluation):
            parts = blocks.parted(program)
            self.assertEqual([part.block for part in parts], [None, *NAMES, None])
            steps = [step for part in parts for step in part.steps]
            self.assertEqual(steps, [*program.steps])

    def test_what_is_kept_of_a_block(self):
        """Its result, in training the statistics that it moves, and sizes; no other value."""
        network = written()
        for program, count in ((network.training, 4), (network.evaluation, 1)):
            sizes = {s.name for s in program.steps if s.operator in ("mul", "aten.sym_size.int")}
            kept_ = [part.results - sizes for part in blocks.parted(program) if part.block]
            self.assertLen(kept_, len(NAMES))
            for names in kept_:
                self.assertLen(names, count, names)
                self.assertLen(names - {*program.moved.values()}, 1)

    def test_each_is_one_checkpoint(self):
        net = trained.classifier(written(), remat=True)
        given = net.init(jax.random.key(0))
        text = str(
            jax.make_jaxpr(lambda x: net.apply(*given, x)[0])(np.ones((2, *IMAGE), np.float32))
        )
        self.assertEqual(text.count("remat2["), len(NAMES))

    def test_less_is_kept_for_the_backward_pass(self):
        network, needed = written(depth=4, width=32), []
        for remat in (False, True):
            net = trained.classifier(network, remat=remat)
            params, stats = net.init(jax.random.key(0))

            def backward(x, net=net, params=params, stats=stats):
                return jax.vjp(lambda x: net.apply(params, stats, x, train=True)[0], x)[1]

            x = jax.ShapeDtypeStruct((64, *IMAGE), jnp.float32)
            kept_ = jax.tree.leaves(jax.eval_shape(backward, x))
            needed.append(sum(a.size * a.dtype.itemsize for a in kept_))
        self.assertLess(needed[1], 0.2 * needed[0])  # one array of a block's more than ten

    def test_equal_blocks_are_compiled_once(self):
        network = written()
        groups = [[part.block for part in parts] for parts in blocks.alike(network.training)]
        # The first computes a size that the others read.
        self.assertEqual(groups, [[None], NAMES[:1], NAMES[1:], [None]])
        texts = []
        for scan in (False, True):
            net = trained.classifier(network, scan=scan)
            given = net.init(jax.random.key(0))
            x = np.ones((2, *IMAGE), np.float32)
            texts.append(
                str(jax.make_jaxpr(lambda x, net=net, given=given: net.apply(*given, x))(x))
            )
        self.assertEqual([text.count("conv_general_dilated[") for text in texts], [7, 4])
        self.assertIn("length=4", texts[1])

    @parameterized.parameters(
        ("Block(4), Block(4), Block(4)", 3),
        ("Block(4), Block(4, padding=2), Block(4)", 1),  # maps of another size afterwards
        ("Block(4), Block(4, mean=True), Block(4)", 1),  # another computation
    )
    def test_what_is_alike(self, made, longest):
        torch.manual_seed(0)
        stem, head = torch.nn.Conv2d(3, 4, 1), torch.nn.Linear(4, 5)
        module = torch.nn.Sequential(stem, *eval(f"({made},)", {"Block": Odd}), Pooled(head))
        network = trainable(module, IMAGE)
        sizes = [len(parts) for parts in blocks.alike(network.training) if parts[0].block]
        self.assertEqual(max(sizes), longest)
        x = np.random.default_rng(0).random((2, *IMAGE), np.float32)
        found = []
        for scan in (False, True):
            net = trained.classifier(network, scan=scan)
            found.append(net.apply(*net.init(jax.random.key(0)), x)[0])
        np.testing.assert_allclose(found[1], found[0], atol=1e-6)

    def test_parts_that_are_no_blocks(self):
        """A numbered convolution with its norm, and whole stages, whose blocks are taken."""
        module = torch.nn.Sequential(
            torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4)),
            torch.nn.Sequential(modules.Block(4), modules.Block(4)),
        )
        exported = torch.export.export(module, (torch.zeros(2, 3, 8, 8),))
        self.assertSameElements(blocks_of(module, exported).values(), ["1.0", "1.1"])

    def test_a_run_keeps_them(self):
        network, folder = written(), self.create_tempdir().full_path
        kept.write(Path(folder), network, {})
        again = kept.read(Path(folder))
        self.assertEqual(dict(again.training.blocks), dict(network.training.blocks))
        self.assertNotEmpty(again.evaluation.blocks)
        with self.subTest("and the hash of what is computed does not depend on them"):
            parted = kept.program_sha256(Path(folder))
            file = Path(folder) / pytorch.PROGRAMS
            head = json.loads(file.read_text())
            for mode in ("training", "evaluation"):
                del head[mode]["blocks"]
            file.write_text(json.dumps(head))
            self.assertEqual(kept.program_sha256(Path(folder)), parted)
