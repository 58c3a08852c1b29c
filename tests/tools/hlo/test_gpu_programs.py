"""Costs of programs for a GPU, by hand, in a text as its compiler writes it and compiled."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import pytest
from absl.testing import absltest, parameterized

from jaxrobust.doctor.programs import hlo, hlo_costs, topology
from jaxrobust.models.kernels.convnext_layers import BlockParameters
from jaxrobust.runtime.devices import hardware
from tests.support import paths, sweeps, tpu
from tools.gpu import make_environment
from tools.hlo import figures, overlap, parts, ptx

H100 = hardware.chip("NVIDIA H100 SXM")
# A depthwise convolution and two products, the second with the residual.
B, SIDE, WIDTH, HIDDEN = 32, 16, 64, 256
PIXELS = B * SIDE * SIDE
MAP, WEIGHTS = 2 * PIXELS * WIDTH, 2 * WIDTH * HIDDEN  # bytes
INSIDE = B * (3 * SIDE - 2) ** 2  # of the 3 x 3 inputs of each pixel
COSTS = {  # kernels, bytes and FLOPs
    "depthwise": (1, 2 * MAP + 2 * 9 * WIDTH, 2 * INSIDE * WIDTH),
    "matrix product": (2, 11 * MAP + 2 * WEIGHTS, 2 * 2 * PIXELS * WIDTH * HIDDEN),
    "element-wise": (1, (4 + 4) * MAP, 0),
    "copy": (1, 2 * 2 * 9 * WIDTH, 0),  # of the convolution's kernel
}


NEEDS = absltest.skipUnless(
    importlib.util.find_spec("jax_cuda12_plugin"),
    f"needs the GPU compiler: python3.13 {make_environment.__name__.replace('.', '/')}.py",
)


def network(x, k, first, second):
    dimensions = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(
        x, k, (1, 1), "SAME", dimension_numbers=dimensions, feature_group_count=WIDTH
    )
    hidden = jax.nn.gelu((y.reshape(-1, WIDTH) @ first).astype(jnp.float32), approximate=False)
    return x + (hidden.astype(x.dtype) @ second).reshape(x.shape)


class TwoLayersTest(absltest.TestCase):
    def check(self, text):
        module = hlo.parse(text)
        found = figures.read(module, H100)
        counted = {
            kind: (row["runs"], row["bytes"], row["flops"])
            for kind, row in found["by_part"]["other"].items()
        }
        self.assertEqual(counted, COSTS)
        costs = topology.costs(module, H100)
        self.assertEqual(costs["kernels_launched"], 5)
        bound = sum(cost[1] for cost in COSTS.values()) / H100.bandwidth  # no product is slower
        self.assertAlmostEqual(costs["kernels_s"], bound, delta=1e-6 * bound)
        return found

    def test_in_a_text(self):
        found = self.check((paths.GOLDEN / "hlo/gpu_two_layers.txt").read_text())
        head, row, *_ = parts.lines(found)
        self.assertEndsWith(head, "bound ms  share  kernels     GFLOP")
        self.assertEndsWith(row, "0.003  52.5%        2       0.5")

    @pytest.mark.slow
    @NEEDS
    def test_compiled(self):
        sharding = jax.sharding.SingleDeviceSharding(tpu.chips(self, "h100:1")[0])
        shapes = ((B, SIDE, SIDE, WIDTH), (3, 3, 1, WIDTH), (WIDTH, HIDDEN), (HIDDEN, WIDTH))
        arrays = (jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=sharding) for s in shapes)
        self.check(jax.jit(network).lower(*arrays).compile().as_text())


def call(target, operands, result, attributes):
    """A program of one call of a library."""
    names = [f"p.{n}" for n in range(len(operands))]
    lines = [f"  %{n} = {t} parameter({i})" for i, (n, t) in enumerate(zip(names, operands))]  # noqa: B905
    arguments = ", ".join(f"%{name}" for name in names)
    return (
        "HloModule jit_f, is_scheduled=true\n\nENTRY %main (p.0: f32[]) -> f32[] {\n"
        + "\n".join(lines)
        + f"\n  ROOT %call.1 = {result} custom-call({arguments}), "
        f'custom_call_target="{target}", {attributes}\n}}\n'
    )


CONV = "window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, feature_group_count=4"
IMAGE, KERNEL = "bf16[2,8,8,4]{3,2,1,0}", "bf16[4,3,3,1]{3,2,1,0}"
HEADS = "bf16[2,6,10,64]{3,1,2,0}"
SCORES = 'backend_config={"intermediate_tensor_shape": {"dimensions": ["2", "6", "10", "10"]}}'


class LibraryTest(parameterized.TestCase):
    @sweeps.rows(
        ("__cudnn$convForward", (IMAGE, KERNEL), IMAGE, CONV, 2 * 2 * 22**2 * 4),
        ("__cudnn$convBackwardInput", (IMAGE, KERNEL), IMAGE, CONV, 2 * 2 * 22**2 * 4),
        ("__cudnn$convBackwardFilter", (IMAGE, IMAGE), KERNEL, CONV, 2 * 2 * 22**2 * 4),
        ("__cudnn$fmhaSoftmax", (HEADS,) * 3, HEADS, SCORES, 2 * 2 * 12 * 100 * 64),
        ("__cudnn$fmhaSoftmaxBackward", (HEADS,) * 6, HEADS, SCORES, 5 * 2 * 12 * 100 * 64),
        ("__cublas$gemm", ("f32[5,7]{1,0}", "f32[7,3]{1,0}"), "f32[5,3]{1,0}",
         'backend_config={"lhs_contracting_dimensions":["1"]}', 2 * 5 * 7 * 3),
        ("mosaic_gpu_v2", (IMAGE,), IMAGE,
         r'backend_config={cost_estimate_json = "{\22flops\22: 123, \22bytes_accessed\22: 45}"}',
         123),
        ("x", (IMAGE,), IMAGE, "", 0),
    )  # fmt: skip
    def test_operations(self, target, operands, result, attributes, flops):
        text = call(target, operands, f"({result}, u8[0]{{0}})", attributes)
        self.assertEqual(hlo_costs.flops(hlo.parse(text)), flops)
        if target.startswith("mosaic"):  # also declares its bytes
            self.assertEqual(hlo_costs.traffic(hlo.parse(text)), 45)


SLICED = """HloModule jit_f, is_scheduled=true, num_partitions=8

%fused (p.0: bf16[128,197,2304]) -> bf16[128,198,768] {
  %p.0 = bf16[128,197,2304]{2,1,0} parameter(0)
  %zero = bf16[] constant(0)
  %pad.1 = bf16[128,198,2304]{2,1,0} pad(%p.0, %zero), padding=0_0x0_1x0_0
  ROOT %slice.1 = bf16[128,198,768]{2,1,0} slice(%pad.1), slice={[0:128], [0:198], [0:768]}
}

ENTRY %main (x: bf16[128,197,2304]) -> bf16[128,198,768] {
  %x = bf16[128,197,2304]{2,1,0} parameter(0)
  %sum.1 = bf16[128,197,2304]{2,1,0} all-reduce-start(%x), replica_groups=[1,8]<=[8]
  %f = bf16[128,198,768]{2,1,0} fusion(%x), kind=kLoop, calls=%fused
  %sum.2 = bf16[128,197,2304]{2,1,0} all-reduce-done(%sum.1)
  ROOT %end = bf16[128,198,768]{2,1,0} bitcast(%f)
}
"""


class SlicedTest(absltest.TestCase):
    def test_a_padded_slice_reads_its_part_behind_a_message(self):
        module, part = hlo.parse(SLICED), 2 * 128 * 198 * 768
        reads = {w.instruction.name: w.bytes for w in hlo_costs.works(module, H100)}
        self.assertEqual(reads["f"], 2 * part)
        (flight,) = overlap.in_flight(module, H100)
        self.assertAlmostEqual(flight.cycles, 2 * part / H100.bandwidth)  # seconds
        costs = topology.costs(module, H100) | figures.read(module, H100)
        hidden = figures.hidden(costs, H100)["hidden_bytes"]
        self.assertAlmostEqual(hidden, 2 * part / H100.bandwidth * H100.interconnect, delta=1)


class KernelTest(absltest.TestCase):
    """bf16[512,256] @ bf16[256,128] in eight blocks of 64 rows and four turns of 64 columns."""

    FLOPS, READ = 2 * 512 * 256 * 128, 2 * (512 * 256 + 256 * 128)
    COPIED = 8 * 4 * 2 * (64 * 64 + 64 * 128)

    def test_in_ptx(self):
        text = (paths.GOLDEN / "hlo/gpu_product.ptx").read_text()
        found = ptx.counts(text, 8)
        self.assertEqual(found, {"flops": self.FLOPS, "copied": self.COPIED, "distinct": self.READ})
        one = ptx.counts(text, 1)  # reads all of the second matrix, and an eighth of the first
        self.assertEqual(one["distinct"], 2 * (64 * 256 + 256 * 128))
        with self.assertRaisesRegex(ValueError, "a branch of the kernel depends on %p10, which"):
            ptx.counts(text.replace("mov.b32   %r72, %r4;", ""), 8)

    @pytest.mark.slow
    @NEEDS
    def test_what_our_kernels_declare(self):
        from jaxrobust.models.kernels.cuda import convnext_mlp

        mesh = jax.sharding.Mesh(tpu.chips(self, "h100:1"), "chip")
        place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place)  # noqa: E731
        z, sides = array(128, 56, 56, 96), {"first": (96, 384), "second": (384, 96)}
        sides |= {"first_bias": (384,), "taps": (7, 7, 1, 96)}
        fields = BlockParameters._fields
        p = BlockParameters(*(array(*sides.get(field, (96,))) for field in fields))
        forward = jax.jit(lambda z, p: convnext_mlp.forward(z, z, None, p, eps=1e-6))
        found = figures.compiled(forward, z, p)
        (declared,), (counted,) = found["kernels"], found["ptx"]
        self.assertBetween(declared["flops"] / counted["flops"], 0.9, 1.1)
        moved = counted["copied"] + found["output_bytes"]
        self.assertBetween(declared["bytes"] / moved, 0.9, 1.1)
        self.assertEqual(counted["spilled"], 0)


class RecordsTest(absltest.TestCase):
    """Steps compiled without a GPU, and measured on an H100."""

    def rows(self, name):
        text = (paths.ROOT / "tools/records" / name).read_text()
        return [json.loads(line) for line in text.splitlines()]

    def test_memory_and_time(self):
        measured = [r for r in self.rows("gpu_h100/side_by_side.jsonl") if r["side"] == "jaxrobust"]
        for row in self.rows("gpu_compiled/h100.jsonl"):
            for run in measured:
                if (row["program"], row["network"]) == ("step", run["network"]):
                    ratio = row["memory_bytes"] / run["peak_memory"]
                    self.assertBetween(ratio, 0.98, 1)  # the allocator rounds up
                    self.assertBetween(run["seconds"] / row["kernels_s"], 1, 2.5)

    def test_times_of_layers(self):
        """On an H200, no layer takes less than its kernels' bytes."""
        rows = self.rows("gpu_compiled/h100.jsonl")
        (block,) = (
            r["by_part"]["forward"] for r in rows if r["program"] == "stages.0.blocks.0 forward"
        )
        bandwidth = hardware.chip("NVIDIA H200").bandwidth
        hidden = block["matrix product"]["bytes"] + block["activation"]["bytes"]
        residual = 2 * 128 * 56 * 56 * 96  # which the measured layers lack
        for what, moved in (
            ("mlp 96", hidden - residual),
            ("layer_norm 96", block["norm"]["bytes"]),
        ):
            (row,) = (r for r in self.rows("gpu_h200/layers.jsonl") if r["what"] == what)
            self.assertLess(1e3 * moved / bandwidth, row["forward"])
        (xla,) = (
            r
            for r in self.rows("gpu_h200/depthwise.jsonl")
            if (r["stage"], r["what"]) == (56, "xla")
        )
        self.assertLess(1e3 * block["depthwise"]["bytes"] / bandwidth, xla["ms"])


class EnvironmentTest(absltest.TestCase):
    def test_commands(self):
        venv, install = make_environment.commands(paths.ROOT / "new")
        self.assertEqual(venv[1:], ["-m", "venv", str(paths.ROOT / "new")])
        self.assertEqual(install[0], str(paths.ROOT / "new/bin/python"))
        versions = {package.split("==")[1] for package in install if "==" in package}
        self.assertEqual(versions, {make_environment.JAX})
        self.assertIn("jax>=0.10", install)


if __name__ == "__main__":
    absltest.main()
