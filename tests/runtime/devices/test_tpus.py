"""What the compiler of TPUs is told, and that it is told nothing that it does not know."""

import importlib.util
import os
from unittest import mock

import jax
import numpy as np
from absl.testing import absltest
from jax.sharding import PartitionSpec

from jaxrobust.runtime.devices import hlo, hlo_overlap, sharding, tpus
from tests.support import tpu

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
        with mock.patch.dict(os.environ, own):
            found = tpus.step_options(mesh_of(tpu.chips(self, "v5e:2x2")))
        self.assertEqual(set(tpus.OPTIONS) - set(found), {"xla_enable_async_all_reduce"})

    def test_a_program_that_needs_too_much_fast_memory_is_compiled_sparingly(self):
        lowered = mock.Mock()
        wrong = jax.errors.JaxRuntimeError
        lowered.compile.side_effect = [wrong("E1001: CompileTimeScopedVmemOom: ..."), "program"]
        self.assertEqual(tpus.compiled(lowered), "program")
        self.assertEqual(lowered.compile.call_args.kwargs, {"compiler_options": tpus.SPARING})
        lowered.compile.side_effect = [wrong("RESOURCE_EXHAUSTED: HBM")]
        with self.assertRaisesRegex(wrong, "HBM"):
            tpus.compiled(lowered)


@absltest.skipUnless(there, NEEDS)
class OverlapTest(absltest.TestCase):
    def test_gradients_of_one_layer_are_added_beside_the_products_of_the_next(self):
        chips = tpu.chips(self, "v5e:4x4")
        mesh = mesh_of(chips)
        names = [str(n) for n in range(3)]
        params = {name: jax.ShapeDtypeStruct((512, 512), np.float32) for name in names}
        spread = sharding.spread(mesh, params)

        def loss(params, x):
            for name in names:
                x = jax.nn.gelu(x @ params[name])
            return (x * x).mean()

        def of_device(params, x):
            grads = jax.grad(loss)(spread.gather(params), x)
            return spread.reduce(grads), x.mean()

        def step(params, x):
            return spread.each(of_device, whole=0, split=1, gradients=True)(params, x)[0]

        placed = sharding.of_state(mesh, params)
        rows = jax.NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
        x = jax.ShapeDtypeStruct((4096 * 16, 512), np.float32)
        program = jax.jit(
            step,
            in_shardings=(placed, rows),
            out_shardings=placed,
            compiler_options=tpus.step_options(mesh),
        )
        module = hlo.parse(program.lower(params, x).compile().as_text())
        sums = [c for c in hlo.collectives(module) if not c.kind.startswith("all-gather")]
        beside = [c for c in hlo_overlap.in_flight(module) if not c.kind.startswith("all-gather")]
        # The last gradient, that of the first layer, has nothing left to be beside.
        self.assertGreaterEqual(sum(c.sent for c in beside), sum(c.sent for c in sums) / 2)
        self.assertTrue(all(c.cycles > 0 for c in beside))


if __name__ == "__main__":
    absltest.main()
