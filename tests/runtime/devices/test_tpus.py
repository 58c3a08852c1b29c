"""What the compiler of TPUs is told, and that it is told nothing that it does not know."""

import importlib.util
import os
import subprocess
import sys
from unittest import mock

import jax
import numpy as np
import pytest
from absl.testing import absltest

from jaxrobust.runtime.devices import sharding, tpus
from tests.support import paths, tpu

there = importlib.util.find_spec("libtpu") is not None
NEEDS = "needs the TPU compiler: pip install -e '.[test,tpu-aot]'"


def mesh_of(chips):
    return sharding.make_mesh(chips, fsdp=len(chips))


class OptionsTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        tpus._known.cache_clear()
        self.addCleanup(tpus._known.cache_clear)

    def test_other_devices_get_none(self):
        self.assertIsNone(tpus.step_options(mesh_of(jax.devices())))

    @absltest.skipUnless(there, NEEDS)
    def test_this_compiler_knows_them_all(self):
        chips = tpu.chips(self, "v5e:2x2")
        self.assertEqual(tpus.step_options(mesh_of(chips)), tpus.OPTIONS)
        self.assertIsNone(tpus.step_options(mesh_of(chips[:1])))  # which sends nothing

    @absltest.skipUnless(there, NEEDS)
    def test_what_a_compiler_does_not_know_is_left_out(self):
        with mock.patch.dict(tpus.OPTIONS, {"xla_tpu_of_another_time": "true"}):
            found = tpus.step_options(mesh_of(tpu.chips(self, "v5e:2x2")))
        self.assertEqual(found, tpus.OPTIONS)

    @absltest.skipUnless(there, NEEDS)
    def test_what_people_say_themselves_stays(self):
        own = {"LIBTPU_INIT_ARGS": "--xla_enable_async_all_reduce=false --xla_tpu_x=1"}
        mesh = mesh_of(tpu.chips(self, "v5e:2x2"))
        with mock.patch.dict(os.environ, own):
            found = tpus.step_options(mesh)
        self.assertEqual(set(tpus.OPTIONS) - set(found), {"xla_enable_async_all_reduce"})

    def test_several_tpus_alone_have_options(self):
        def options(platform: str, *processes: int):
            chips = [mock.Mock(platform=platform, process_index=at) for at in processes]
            self.chips = chips
            mesh = mock.Mock(devices=np.array(chips), size=len(chips))
            return tpus.step_options(mesh)

        with mock.patch.object(tpus, "_known", return_value=tuple(tpus.OPTIONS)) as known:
            self.assertIsNone(options("tpu", 0))
            self.assertIsNone(options("cpu", 0, 0))
            self.assertEqual(options("tpu", 1, 0), tpus.OPTIONS)
            known.assert_called_once_with(self.chips[1])  # which this process can ask

    def test_a_program_that_needs_too_much_fast_memory_is_compiled_sparingly(self):
        lowered = mock.Mock()
        wrong = jax.errors.JaxRuntimeError
        lowered.compile.side_effect = [wrong("E1001: CompileTimeScopedVmemOom: ..."), "program"]
        self.assertEqual(tpus.compiled(lowered), "program")
        self.assertEqual(lowered.compile.call_args.kwargs, {"compiler_options": tpus.SPARING})
        lowered.compile.side_effect = [wrong("RESOURCE_EXHAUSTED: HBM")]
        with self.assertRaisesRegex(wrong, "HBM"):
            tpus.compiled(lowered)


# Three layers on 16 chips that share the state; prints what sums send, and that of those next to
# other work.
PROGRAM = """
from jaxrobust.doctor.programs import topology
chips = topology.devices("v5e:4x4")
import jax
from jaxrobust.doctor.programs import hlo
from jaxrobust.runtime.devices import sharding, tpus
from tools.hlo import overlap

mesh = sharding.make_mesh(chips, fsdp=16)
params = {name: jax.ShapeDtypeStruct((512, 512), "float32") for name in "abc"}
spread = sharding.spread(mesh, params)

def loss(params, x):
    for name in params:
        x = jax.nn.gelu(x @ params[name])
    return (x * x).mean()

def of_device(params, x):
    return spread.reduce(jax.grad(loss)(spread.gather(params), x)), x.mean()

step = lambda params, x: spread.each(of_device, copies=0, split=1, gradients=True)(params, x)[0]
placed, rows = sharding.of_state(mesh, params), sharding.by_image(mesh)
program = jax.jit(
    step,
    in_shardings=(placed, rows),
    out_shardings=placed,
    compiler_options=tpus.step_options(mesh),
).lower(params, jax.ShapeDtypeStruct((4096 * 16, 512), "float32"))
module = hlo.parse(tpus.compiled(program).as_text())
print(sum(c.sent for c in hlo.collectives(module) if c.kind == "all-reduce"))
print(sum(c.sent for c in overlap.in_flight(module) if c.kind == "all-reduce" and c.cycles))
"""


@pytest.mark.slow
@absltest.skipUnless(there, NEEDS)
class OverlapTest(absltest.TestCase):
    def test_gradients_of_one_layer_are_added_beside_the_products_of_the_next(self):
        # Alone: where XLA is to be quick, as in tests, it leaves all this out.
        own = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        command = [sys.executable, "-c", PROGRAM]
        done = subprocess.run(command, env=own, capture_output=True, text=True, cwd=paths.ROOT)
        self.assertEqual(done.returncode, 0, done.stderr)
        sent, beside = map(float, done.stdout.split())
        self.assertEqual(sent, 3 * 2 * 512 * 512 * 4 * 15 / 16)
        self.assertGreaterEqual(beside, sent / 2)  # the last one has nothing left to overlap with
