"""Annotations: public functions have them, and tests compare calls with their shapes."""

import ast
import dataclasses
import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxrobust import attacks
from jaxrobust.evaluation.engine import accuracy
from jaxrobust.evaluation.network import checks
from jaxrobust.models.interface import network_inputs
from jaxrobust.runtime.commandline import threats
from jaxrobust.types import NORMS, Threat
from tests.support import paths, sweeps

NORM = {"norm": "linf", "epsilon": 0.1}


def public(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef, bool]]:
    """(name, function, whether it has a `self`) of a module and its public classes."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node.name, node, False
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for method in node.body:
                if not isinstance(method, ast.FunctionDef):
                    continue
                name = method.name
                static = any(ast.unparse(d) == "staticmethod" for d in method.decorator_list)
                if not name.startswith("_") or (name.startswith("__") and name.endswith("__")):
                    yield f"{node.name}.{name}", method, not static


def unannotated(function: ast.FunctionDef, method: bool) -> list[str]:
    a = function.args
    arguments = [*a.posonlyargs, *a.args][method:] + a.kwonlyargs + [a.vararg, a.kwarg]
    missing = [arg.arg for arg in arguments if arg is not None and arg.annotation is None]
    return missing + ["return"] * (function.returns is None)


class AnnotationsTest(absltest.TestCase):
    def test_public_functions_have_them(self):
        missing, count = [], 0
        for folder in ("jaxrobust", "tools"):
            for path in sorted((paths.ROOT / folder).rglob("*.py")):
                for name, function, method in public(ast.parse(path.read_text())):
                    count += 1
                    if names := unannotated(function, method):
                        place = f"{path.relative_to(paths.ROOT)}:{function.lineno}"
                        missing.append(f"{place} {name}: {', '.join(names)}")
        self.assertGreater(count, 800)
        self.assertEmpty(missing)


class ThreatTest(parameterized.TestCase):
    def test_what_is_none(self):
        for norm, epsilon, message in (
            ("l3", 0.1, "norm='l3' is unknown; choose one of linf, l2, l1"),
            ("Linf", 0.1, "norm='Linf' is unknown"),
            ("linf", 4, r"epsilon=4.0 is larger than the pixel range \[0, 1\]; write 4/255"),
            ("l2", -1, "epsilon=-1.0 is not a valid radius; pass a finite number >= 0"),
            ("l2", float("nan"), "epsilon=nan is not a valid radius"),
            ("l1", float("inf"), "epsilon=inf is not a valid radius"),
            ("l2", "1", "epsilon='1' is not a number; pass one without quotes"),
            ("l2", None, "epsilon=None is not a number"),
        ):
            with self.subTest(row=(norm, epsilon, message)):
                with self.assertRaisesRegex(ValueError, message):
                    Threat(norm, epsilon)
                with self.assertRaisesRegex(ValueError, message):
                    dataclasses.replace(Threat("l2", 1.0), norm=norm, epsilon=epsilon)

    def test_read_and_printed(self):
        for text, printed, written in (
            ("linf:4/255", "linf 0.01569", "linf 4/255"),
            (" Linf : 0.1 ", "linf 0.1", "linf 0.1"),
            ("L2:0.5", "l2 0.5", "l2 0.5"),
            ("l1:12", "l1 12", "l1 12"),
            ("l2:0", "l2 0", "l2 0"),
        ):
            with self.subTest(row=(text, printed, written)):
                threat = threats.parse(text)
                self.assertEqual((str(threat), threat.written()), (printed, written))
                self.assertEqual(threats.parse(threat.written().replace(" ", ":")), threat)
                self.assertEqual(Threat.of(threat.settings() | {"steps": 3}), threat)

    def test_every_norm_has_a_geometry(self):
        self.assertEqual(tuple(attacks.GEOMETRIES), NORMS)


class ShapesTest(parameterized.TestCase):
    """With the hook that pytest alone sets before it collects tests."""

    def setUp(self):
        super().setUp()
        if "tests.support.starting" not in sys.modules:
            self.skipTest("needs pytest, which starts so")
        self.images, self.labels = jnp.full((2, 4, 4, 3), 0.5), jnp.zeros(2, jnp.int32)

    def refused(self):
        return self.assertRaisesRegex(jaxtyping.TypeCheckError, "Type-check error")

    def test_every_function_is_looked_at(self):
        from tests.support import starting

        for name in starting.SHAPED:
            module = importlib.import_module(name)
            own = [f for f in vars(module).values() if inspect.isfunction(f)]
            own = [f for f in own if f.__module__.startswith(name) and f.__name__ != "<lambda>"]
            self.assertNotEmpty(own)
            for function in own:
                self.assertTrue(hasattr(function, "__wrapped__"), function)

    def test_logits_of_another_rank(self):
        for loss in ("ce", "cw", "dlr", "kl"):
            with self.subTest(loss=loss), self.refused():
                attacks.LOSSES[loss](jnp.zeros((2, 5, 1)), self.labels)

    def test_labels_of_another_type(self):
        with self.refused():
            attacks.cw_loss(jnp.zeros((2, 5)), jnp.zeros(2))

    def test_a_letter_is_one_size(self):
        with self.refused():
            attacks.cw_loss(jnp.zeros((2, 5)), jnp.zeros(3, jnp.int32))
        project = attacks.GEOMETRIES["l2"].project
        with self.refused():
            project(self.images, self.images, jnp.ones(3))
        with self.refused():
            project(self.images, self.images[:, :3], jnp.ones(2))

    @pytest.mark.slow
    def test_logits_of_a_network(self):
        for attack in (attacks.apgd(**NORM, steps=1), attacks.square(**NORM, queries=1)):
            with self.assertRaisesRegex(ValueError, r"returns \(2, 4, 4\), but this attack needs"):
                attack(lambda x: x.sum(axis=3), jax.random.key(0), self.images, self.labels)

    def test_images_of_another_rank(self):
        for attack in (attacks.pgd(**NORM, steps=1), attacks.fab(**NORM, steps=1)):
            with self.refused():
                attack(lambda x: x[:, 0], jax.random.key(0), self.images[..., 0], self.labels)
        with self.refused():
            attacks.apgd_run(lambda x: x[:, 0], self.images[0], self.labels, **NORM, steps=1)

    def test_inside_jit(self):
        with self.refused():
            jax.jit(attacks.ce_loss)(jnp.zeros((2, 5, 1)), self.labels)

    def test_in_evaluations(self):
        with self.refused():
            checks.is_right(np.zeros(5), np.zeros(5, int))
        with self.refused():
            network_inputs.unit_range(jnp.zeros((2, 4, 4, 3), jnp.int32))
        attack = accuracy.apgd_ce(Threat(**NORM), steps=1)
        with self.refused():
            attack(lambda x: x.sum(axis=(1, 2)), jax.random.key(0), self.images, self.images)

    @sweeps.fast("pgd")
    @parameterized.parameters(*attacks.MACHINES)
    def test_states_are_what_they_say(self, name):
        facts = attacks.MACHINES[name]
        setting = attacks.Setting(name, name, facts.norms[0], steps=10)
        machine = facts.make(setting, jnp.float32(2 if setting.norm == "l0" else 0.1))
        keys = attacks.image_keys(jax.random.key(0), 2)
        given = {"keys": keys, "targets": self.labels, "start": "random"}
        state = machine.init(self.images, self.labels, **given)
        told = attacks.advance(machine, lambda x, draw: x.sum(axis=(1, 2)), state).state
        for either in (state, told):
            either = getattr(either, "run", either)
            hints = type(either).__annotations__
            with jaxtyping.jaxtyped("context"):
                for field, value in either._asdict().items():
                    if hints[field] is not Any:  # the targets of any task
                        self.assertIsInstance(value, hints[field], field)


class CostTest(absltest.TestCase):
    def test_nothing_is_checked_elsewhere(self):
        code = (
            "import sys, jaxrobust, jaxrobust.attacks, jaxrobust.models, jaxrobust.evaluation\n"
            "from jaxrobust import attacks\n"
            "print('beartype' in sys.modules, hasattr(attacks.ce_loss, '__wrapped__'))"
        )
        out = subprocess.run(
            [sys.executable, "-c", code], cwd=paths.ROOT, capture_output=True, text=True, check=True
        ).stdout
        self.assertEqual(out.split(), ["False", "False"])
