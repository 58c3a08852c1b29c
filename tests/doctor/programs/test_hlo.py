"""Collectives in the text of programs: compiled for 8 CPU devices, and as TPUs' are written."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax import lax
from jax.sharding import AxisType, Mesh, PartitionSpec

from jaxrobust.doctor.programs import hlo, hlo_costs
from tests.support import paths, sweeps


def compiled(function, *arguments, split=(), cut=False):
    """The text of a program of 8 devices; arguments in `split`, or the result, are cut in rows."""
    mesh = Mesh(np.array(jax.devices()[:8]), ("x",), axis_types=(AxisType.Auto,))
    specs = tuple(PartitionSpec("x" if n in split else None) for n in range(len(arguments)))
    function = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=specs,
        out_specs=PartitionSpec("x" if cut else None),
        check_vma=False,
    )
    return jax.jit(function).lower(*arguments).compile().as_text()


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def found(text):
    """{kind: the only collective of this kind}."""
    collectives = hlo.collectives(hlo.parse(text))
    assert len({c.kind for c in collectives}) == len(collectives), collectives
    return {c.kind: c for c in collectives}


def total(x):
    return lax.psum(x, "x")


def repeat(steps, x, body):
    return lax.scan(lambda carry, _: (body(carry), None), x, None, length=steps)[0]


class CompiledTest(parameterized.TestCase):
    @sweeps.rows(2, 10)
    def test_a_sum_in_a_loop_counts_each_time(self, steps):
        def f(x):
            return repeat(steps, x, lambda x: jnp.tanh(lax.psum(x, "x")))

        (total,) = found(compiled(f, array(8, 16), split=[0])).values()
        self.assertEqual(total.kind, "all-reduce")
        self.assertTrue(total.inside)
        self.assertEqual((total.times, total.bytes, total.arrays), (steps, 64, 1))
        self.assertEqual(total.sent, 2 * 64 * 7 / 8)
        self.assertEqual(total.parameters, ())  # what a loop carries on is not a parameter

    @sweeps.rows(
        (lambda x: total(repeat(5, x, jnp.tanh)), False, 1),  # after a loop
        (lambda x: repeat(3, x, lambda x: repeat(4, x, lambda x: jnp.tanh(total(x)))), True, 12),
        (
            jax.named_scope("attack")(lambda x: total(jnp.tanh(x))),
            True,
            1,
        ),  # though it is not a loop
    )
    def test_a_sum_is_inside_of_loops_and_of_the_attack(self, f, inside, times):
        (only,) = found(compiled(f, array(8, 16), split=[0])).values()
        self.assertEqual((only.inside, only.times), (inside, times))

    def test_a_loop_of_unknown_length(self):
        def f(x):
            return lax.while_loop(lambda x: x.sum() < 9, lambda x: x + lax.psum(x, "x"), x)

        collectives = hlo.collectives(hlo.parse(compiled(f, array(8, 16), split=[0])))
        self.assertNotEmpty(collectives)
        for total in collectives:
            self.assertEqual((total.inside, total.times), (True, None))

    def test_a_parameter_is_gathered_once_before_the_loop(self):
        def f(w, x):
            w = lax.all_gather(w, "x", axis=0, tiled=True)
            return lax.psum(repeat(6, x, lambda x: jnp.tanh(x @ w)), "x")

        kinds = found(compiled(f, array(64, 64), array(8, 64), split=[0, 1]))
        gather = kinds["all-gather"]
        self.assertEqual((gather.inside, gather.times, gather.bytes), (False, 1, 64 * 64 * 4))
        self.assertEqual(gather.sent, 64 * 64 * 4 * 7 / 8)
        self.assertLen(gather.parameters, 1)
        self.assertEqual(kinds["all-reduce"].parameters, ())  # the loop has computed it

    def test_a_parameter_that_a_loop_gathers_again(self):
        def f(w, x):
            def body(x):
                return jnp.tanh(
                    x @ lax.all_gather(lax.optimization_barrier((w, x))[0], "x", tiled=True)
                )

            return repeat(6, x, body)

        gather = found(compiled(f, array(64, 64), array(8, 64), split=[0, 1]))["all-gather"]
        self.assertEqual((gather.inside, gather.times), (True, 6))
        self.assertLen(gather.parameters, 1)

    def test_a_parameter_that_is_added_up_is_not_gathered(self):
        (total,) = found(compiled(lambda x: lax.psum(x, "x"), array(8, 16), split=[0])).values()
        self.assertEqual((total.kind, total.parameters), ("all-reduce", ()))

    def test_gradients_that_are_scattered(self):
        def f(x):
            return lax.psum_scatter(jnp.tanh(x), "x", scatter_dimension=0, tiled=True)

        text = compiled(f, array(64, 32), cut=True)
        (scatter,) = found(text).values()
        self.assertEqual(scatter.kind, "reduce-scatter")
        self.assertEqual(scatter.bytes, 8 * 32 * 4)
        self.assertEqual(scatter.sent, 7 * 8 * 32 * 4)

    def test_other_kinds(self):
        def f(x):
            y = lax.ppermute(jnp.tanh(x), "x", [(i, (i + 1) % 8) for i in range(8)])
            return y + lax.all_to_all(jnp.sin(x), "x", 1, 1, tiled=True)

        kinds = found(compiled(f, array(8, 16), split=[0], cut=True))
        self.assertCountEqual(kinds, ["collective-permute", "all-to-all"])
        self.assertEqual({c.bytes for c in kinds.values()}, {64})

    def test_a_program_without_collectives(self):
        module = hlo.parse(compiled(lambda x: repeat(5, x, jnp.tanh), array(8, 16)))
        self.assertEqual(hlo.collectives(module), [])

    @sweeps.rows(1, 7)
    def test_operations_of_a_loop(self, steps):
        def f(w, x):
            return repeat(steps, x, lambda x: jnp.tanh(jnp.sin(x) @ w) @ w)

        module = hlo.parse(compiled(f, array(48, 48), array(40, 48)))
        self.assertEqual(hlo_costs.flops(module), steps * 2 * 2 * 40 * 48 * 48)

    @sweeps.rows((1, "SAME", 1), (2, "VALID", 1), (2, "SAME", 4))
    def test_operations_of_a_convolution(self, stride, padding, groups):
        def f(w, x):
            return lax.conv_general_dilated(
                x,
                w,
                (stride, stride),
                padding,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=groups,
            )

        # XLA's own count, which leaves out what meets padding, of the program before optimization.
        arguments = array(3, 3, 8 // groups, 12), array(2, 9, 9, 8)
        lowered = jax.jit(f).lower(*arguments)
        text = lowered.compiler_ir("hlo").as_hlo_module().to_string()
        self.assertEqual(
            hlo_costs.flops(hlo.parse(text)), lowered.compile().cost_analysis()["flops"]
        )


# Cut down from programs that libtpu 0.0.42 made for v5e:4x4 and v5e:2x2; bodies as it writes them:
# a gather that runs next to a product of matrices (its start, the fusion it runs in, and its end),
# the same next to a loop of four, written as a sum of zeros into which each chip has put its part,
# and with a start and an end of its own; a loop whose trip count is in its comparison alone.
TEXTS = {path.stem: path.read_text() for path in (paths.ROOT / "tests/golden/hlo").glob("*.txt")}
LOOP = TEXTS["loop"]
HEAD = "HloModule jit_f, is_scheduled=true, num_partitions=16\n\n"


class TpuTextTest(parameterized.TestCase):
    @parameterized.named_parameters(
        ("fused", "gather_beside_product", "all-gather", 2, 15 / 16),
        ("beside_a_loop", "gather_beside_loop", "all-gather", 2, 15 / 16),
        ("as_a_sum", "gather_as_sum", "all-reduce", 2, 2 * 15 / 16),
        ("started", "gather_start", "all-gather", 4, 15 / 16),
    )
    def test_one_gather_of_a_parameter(self, text, kind, itemsize, factor):
        (gather,) = hlo.collectives(hlo.parse(TEXTS[text]))
        size = 1024 * 4096 * itemsize
        self.assertEqual((gather.kind, gather.bytes, gather.sent), (kind, size, size * factor))
        self.assertEqual((gather.inside, gather.times, gather.arrays), (False, 1, 1))
        self.assertEqual(gather.parameters, ("p['0.a']",))

    def test_a_computation_that_hundreds_of_instructions_call_one_after_another(self):
        """Who asks where one's value was meets each of them once."""
        calls, count = "", 700
        for number in range(1, count + 1):
            before = f"get-tuple-element.{number - 1}" if number > 1 else "p"
            calls += f"  %fusion.{number} = (f32[8]) fusion(%{before}), kind=kLoop, calls=%shared\n"
            calls += f"  %get-tuple-element.{number} = f32[8] get-tuple-element(%fusion.{number}), "
            calls += "index=0\n"
        text = (
            "HloModule jit_f, is_scheduled=true, num_partitions=4\n\n"
            "%shared (q: f32[8]) -> (f32[8]) {\n  %q = f32[8] parameter(0)\n"
            "  %moved = f32[8] copy(%q)\n  ROOT %out = (f32[8]) tuple(%moved)\n}\n\n"
            "ENTRY %main (p: f32[8]) -> f32[32] {\n  %p = f32[8] parameter(0)\n"
            f"{calls}"
            f"  ROOT %all-gather.1 = f32[32] all-gather(%get-tuple-element.{count}), "
            "dimensions={0}\n}\n"
        )
        (gather,) = found(text).values()
        self.assertEqual(gather.parameters, ("p",))

    def test_a_loop_s_length_is_in_its_condition(self):
        (total,) = hlo.collectives(hlo.parse(LOOP))
        self.assertEqual((total.inside, total.times, total.bytes), (True, 10, 256))
        self.assertEqual((total.sent, total.parameters), (2 * 256 * 3 / 4, ()))

    def test_fast_memory_costs_no_traffic(self):
        # The loop's sum reads fast memory and writes 8 rows of 128 values, of which 8 are not
        # padding, 10 times; a scalar stays there.
        body = 10 * (8 * 128 * 4 + 3 * 4)
        condition = 10 * (2 * 4 + 1)
        self.assertEqual(hlo_costs.traffic(hlo.parse(LOOP)), body + condition + 8)

    def test_a_part_that_is_written_in_place_counts_alone(self):
        """It is read and written: 2 x 8 rows of 128 values, and not the 1,024 rows around them."""
        text = HEAD + (
            "ENTRY %main.4 (whole: f32[1024,128], part: f32[8,128], at: s32[]) -> f32[1024,128] {\n"
            "  %whole = f32[1024,128]{1,0:T(8,128)} parameter(0)\n"
            "  %part = f32[8,128]{1,0:T(8,128)} parameter(1)\n  %at = s32[]{:T(128)} parameter(2)\n"
            "  ROOT %placed = f32[1024,128]{1,0:T(8,128)} dynamic-update-slice(%whole, %part, %at, "
            "%at)\n}\n"
        )
        self.assertEqual(hlo_costs.traffic(hlo.parse(text)), 2 * 8 * 128 * 4)

    @sweeps.rows(
        # The part that is placed (8 rows) and the one that is taken (16), not the 1,024 rows.
        ("parameter(0)", "dynamic-slice(%whole.1, %at.1, %at.1)", 8 + 16),
        # Zeros are not array of before: all that is written counts.
        ("broadcast(%at.1), dimensions={}", "dynamic-slice(%whole.1, %at.1, %at.1)", 1024),
        ("parameter(0)", "slice(%whole.1), slice={[0:16], [0:128]}", 8 + 1024),
        # What is computed of the array with its new part reads all, and writes all.
        ("parameter(0)", "dynamic-slice(%whole.1, %at.1, %at.1)", 1024 + 1024, "negate(%placed)"),
    )
    def test_a_fusion_counts_the_parts_that_it_takes_and_places(
        self, base, taken, rows, end="bitcast(%placed)"
    ):
        whole, tile = "f32[1024,128]{1,0:T(8,128)", "{1,0:T(8,128)}"
        text = HEAD + (
            f"%fused (a: f32[1024,128], at: s32[]) -> (f32[1024,128], f32[8,128]) {{\n"
            f"  %whole.1 = {whole}}} {base}\n  %at.1 = s32[]{{:T(128)}} parameter(1)\n"
            f"  %rows = f32[16,128]{tile} {taken}\n"
            f"  %part = f32[8,128]{tile} slice(%rows), slice={{[0:8], [0:128]}}\n"
            f"  %placed = {whole}}} dynamic-update-slice(%whole.1, %part, %at.1, %at.1)\n"
            f"  %again = {whole}}} {end}\n"
            f"  ROOT %both = ({whole}}}, f32[8,128]{tile}) tuple(%again, %part)\n}}\n\n"
            "ENTRY %main.5 (whole: f32[1024,128], at: s32[]) -> f32[1024,128] {\n"
            f"  %whole = {whole}}} parameter(0)\n  %at = s32[]{{:T(128)S(1)}} parameter(1)\n"
            f"  %f = ({whole}}}, f32[8,128]{{1,0:T(8,128)S(1)}}) fusion(%whole, %at), kind=kLoop, "
            "calls=%fused\n"
            f"  ROOT %end = {whole}}} get-tuple-element(%f), index=0\n}}\n"
        )
        self.assertEqual(hlo_costs.traffic(hlo.parse(text)), rows * 128 * 4)

    def test_a_text_that_is_no_module(self):
        with self.assertRaisesRegex(ValueError, "no ENTRY computation; pass the text of compiled"):
            hlo.parse("HloModule jit_f\n")


class SizeTest(parameterized.TestCase):
    @sweeps.rows(
        ("f32[]", 4),
        ("bf16[3,6,64]{2,1,0:T(8,128)(2,1)S(1)}", 2304),
        ("(f32[8]{0}, /*index=1*/pred[3]{0}, u32[]{:S(2)})", 39),
        ("s4[6]{0:T(8,128)E(4)}", 3),
        ("f8e4m3fn[5]{0}", 5),
        ("c64[2]{0}", 16),
        ("()", 0),
    )
    def test_bytes_of_a_type(self, type_, size):
        self.assertEqual(hlo.size(type_), size)

    @sweeps.rows(
        ("bf16[88,197,384]{2,1,0:T(8,128)(2,1)}", 88 * 200 * 384 * 2),
        ("bf16[88,6,197,197]{2,3,1,0:T(8,128)(2,1)S(1)}", 88 * 6 * 256 * 200 * 2),
        ("f32[56,96]{1,0:T(8,128)}", 56 * 128 * 4),
        ("f32[56,96]{0,1:T(8,128)}", 96 * 128 * 4),
        ("f32[384]{0:T(512)}", 512 * 4),
        ("f32[5,3]{1,0}", 60),
        ("s32[]{:T(128)}", 4),
    )
    def test_bytes_with_the_padding_of_tiles(self, type_, size):
        self.assertEqual(hlo.padded_size(type_), size)


class RunsTest(absltest.TestCase):
    def test_what_a_loop_calls_is_inside_of_it_too(self):
        module = hlo.parse(TEXTS["called_in_loop"])
        found = hlo.runs(module)
        inside = dict.fromkeys(("body", "fused", "cond"), (4, True))
        self.assertEqual(found, inside | {"main": (1, False)})
        unknown = hlo.parse(TEXTS["called_in_loop"].replace("known_trip_count", "other"))
        self.assertEqual(hlo.runs(unknown)["fused"], (None, True))
        self.assertEqual(hlo.runs(unknown, unknown=1)["fused"], (1, True))


class PlacesTest(absltest.TestCase):
    def test_only_arrays_without_another_place_are_in_hbm(self):
        type_ = "(f32[2]{0}, f32[3]{0:T(8)S(1)}, bf16[4,5]{1,0:T(8,128)}, s32[1]{0:S(5)}, pred[])"
        self.assertEqual(
            hlo_costs._in_hbm(type_), ["f32[2]{0}", "bf16[4,5]{1,0:T(8,128)}", "pred[]"]
        )


class WindowTest(parameterized.TestCase):
    """Which values a kernel of two meets as it moves over four, by hand."""

    @sweeps.rows(
        ("size=2", 3, 6),
        ("size=2 stride=2", 2, 4),
        ("size=2 stride=2 pad=1_0", 2, 3),  # -1 and 0, 1 and 2
        ("size=2 stride=2 pad=0_1", 2, 4),  # 0 and 1, 2 and 3
        ("size=2 pad=1_1", 5, 8),
        ("size=2 rhs_dilate=3", 1, 2),  # 0 and 3
        ("size=2 lhs_dilate=2", 6, 6),  # 0, _, 1, _, 2, _, 3: each pair has one of them
    )
    def test_one_axis(self, window, out, met):
        attributes = f", window={{{window}}}, dim_labels=b0f_0io->b0f"
        result = f"f32[3,{out},7]"
        i = hlo.Instruction("c", result, "convolution", (), "", attributes, "main")
        found = hlo_costs._convolution(i, "f32[3,4,5]", "f32[2,5,7]", result)
        self.assertEqual(found, 3 * 5 * 7 * met)


class CyclesTest(absltest.TestCase):
    def test_a_loop_s_cycles_count_as_often_as_it_runs(self):
        each = ', backend_config={"window_config":{"estimated_cycles":"70"}}'
        text = LOOP.replace("add(%i, %one)", "add(%i, %one)" + each)
        self.assertEqual(hlo_costs.cycles(hlo.parse(text)), 700)

    def test_kernels_say_what_they_take(self):
        call = (
            "  %attend.3 = f32[8,8]{1,0:T(8,128)} custom-call(%x), "
            'custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={\n'
            '"cycles":"25"\n}}, metadata={op_name="attend"}, backend_config={"cost_estimate":{'
            '"flops":"64","transcendentals":"8","bytes_accessed":"512"}}\n'
        )
        text = LOOP.replace("  %all-reduce.1", call + "  %all-reduce.1")
        self.assertEqual(hlo_costs.kernels(hlo.parse(text)), [("attend", 10, 25, 64, 512)])
        self.assertEmpty(hlo_costs.kernels(hlo.parse(LOOP)))


class MovedTest(parameterized.TestCase):
    """Bytes between HBM and a chip's units, by hand: f32[8,128] are 4,096."""

    HERE, FAST = "f32[8,128]{1,0:T(8,128)}", "f32[8,128]{1,0:T(8,128)S(1)}"
    WHOLE = "f32[64,128]{1,0:T(8,128)}"

    @sweeps.rows(
        ("copy-start", f"({FAST}, {HERE}, u32[])", (HERE,), 4096),  # read, to fast memory
        ("copy-start", f"({HERE}, {FAST}, u32[])", (FAST,), 4096),
        ("copy-start", f"({HERE}, {HERE}, u32[])", (HERE,), 2 * 4096),
        ("slice-start", f"(({WHOLE}), {FAST}, u32[])", (WHOLE,), 4096),  # of the part alone
        ("slice-start", f"(({WHOLE}), {HERE}, u32[])", (WHOLE,), 2 * 4096),
        ("slice", HERE, (WHOLE,), 2 * 4096),
        ("dynamic-slice", HERE, (WHOLE, "s32[]", "s32[]"), 2 * 4096),
        ("dynamic-update-slice", WHOLE, (WHOLE, HERE, "s32[]"), 2 * 4096),
        ("add", HERE, (HERE, HERE), 3 * 4096),
        ("add", HERE, (HERE, FAST), 2 * 4096),
    )
    def test_of_an_instruction(self, opcode, type_, operands, moved):
        i = hlo.Instruction("i", type_, opcode, (), "", "", "main")
        self.assertEqual(hlo_costs._moved(i, list(operands)), moved)


class TakenTest(absltest.TestCase):
    """What a fusion reads of a value: the parts that it slices, or (None) all of it."""

    def taken(self, *rows):
        make = lambda name, opcode, operands: hlo.Instruction(  # noqa: E731
            name, f"type of {name}", opcode, operands, "", "", "main"
        )
        inside = {row[0]: make(*row) for row in rows}
        return [hlo_costs._taken(inside, make(name, "parameter", ())) for name in "abcd"]

    def test_where_a_value_is_sliced_or_an_index(self):
        found = self.taken(("s", "dynamic-slice", ("a", "b", "c")))
        self.assertEqual(found, [["type of s"], None, None, []])

    def test_parts_are_added_up_through_bitcasts(self):
        rows = [("v", "bitcast", ("a",)), ("s", "dynamic-slice", ("v", "b")),
                ("r", "dynamic-slice", ("a", "b"))]  # fmt: skip
        self.assertEqual(self.taken(*rows)[0], ["type of s", "type of r"])
        self.assertIsNone(self.taken(*rows, ("n", "negate", ("v",)))[0])
