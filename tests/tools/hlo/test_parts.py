"""Bytes and cycles by part and kind, counted by hand in a text as the TPU compiler writes it."""

from unittest import mock

from absl.testing import absltest, parameterized

from jaxrobust.doctor.programs import hlo
from jaxrobust.models.kernels import (
    attention,
    channel_attention,
    convnext_layers,
    local_interaction,
    stem_layers,
    talking_heads,
)
from tests.support import sweeps
from tools.hlo import parts

# Two layers of a step: x f32[8,96] (128 lanes with padding), w f32[96,96] and v f32[96,200] (256).
# The attack goes round five times through the first, the update once through both.
ROW, SQUARE, WIDE = 8 * 128 * 4, 96 * 128 * 4, 96 * 256 * 4
TEXT = """HloModule jit_step, is_scheduled=true

FileNames
1 "/src/jaxrobust/models/families/vit.py"
2 "/src/jaxrobust/models/kernels/primitives.py"
3 "/src/jaxrobust/models/kernels/attention.py"

FunctionNames
1 "Mlp.__call__"
2 "linear"
3 "self_attention"
4 "_softmax"

FileLocations
1 {file_name_id=1 function_name_id=1 line=69 end_line=69 column=4 end_column=35}
2 {file_name_id=2 function_name_id=2 line=17 end_line=17 column=14 end_column=75}
3 {file_name_id=3 function_name_id=3 line=30 end_line=30 column=14 end_column=75}
4 {file_name_id=3 function_name_id=4 line=40 end_line=40 column=14 end_column=75}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=2}
4 {file_location_id=4 parent_frame_id=4}


%fused_product (p0: f32[8,96], p1: f32[96,96]) -> f32[8,96] {
  %p0 = f32[8,96]{1,0:T(8,128)} parameter(0)
  %p1 = f32[96,96]{1,0:T(8,128)} parameter(1)
  ROOT %convolution.1 = f32[8,96]{1,0:T(8,128)} convolution(%p0, %p1), dim_labels=bf_io->bf, \
metadata={op_name="jit(step)/attack/while/body/jvp()/dot_general" stack_frame_id=2}
}

%fused_moves (p2: f32[8,96]) -> f32[8,96] {
  %p2 = f32[8,96]{1,0:T(8,128)} parameter(0)
  ROOT %transpose.1 = f32[8,96]{1,0:T(8,128)} transpose(%p2), dimensions={0,1}
}

%body (carried: (s32[], f32[8,96], f32[96,96])) -> (s32[], f32[8,96], f32[96,96]) {
  %carried = (s32[]{:T(128)}, f32[8,96]{1,0:T(8,128)}, f32[96,96]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%carried), index=0
  %x = f32[8,96]{1,0:T(8,128)} get-tuple-element(%carried), index=1
  %w = f32[96,96]{1,0:T(8,128)} get-tuple-element(%carried), index=2
  %moved = f32[8,96]{1,0:T(8,128)} fusion(%x), kind=kLoop, calls=%fused_moves, \
backend_config={"estimated_cycles":"30"}
  %product = f32[8,96]{1,0:T(8,128)} fusion(%moved, %w), kind=kOutput, calls=%fused_product, \
backend_config={"estimated_cycles":"100"}
  %soft = f32[8,96]{1,0:T(8,128)} exponential(%product), metadata={op_name="jit(step)/attack/\
while/body/transpose(jvp())/exp" stack_frame_id=4}, backend_config={"estimated_cycles":"7"}
  %one = s32[]{:T(128)S(6)} constant(1)
  %next = s32[]{:T(128)S(6)} add(%i, %one)
  ROOT %tuple.1 = (s32[]{:T(128)}, f32[8,96]{1,0}, f32[96,96]{1,0}) tuple(%next, %soft, %w)
}

%condition (carried.1: (s32[], f32[8,96], f32[96,96])) -> pred[] {
  %end = s32[]{:T(128)S(6)} constant(5)
  %carried.1 = (s32[]{:T(128)}, f32[8,96]{1,0:T(8,128)}, f32[96,96]{1,0:T(8,128)}) parameter(0)
  %i.1 = s32[]{:T(128)S(6)} get-tuple-element(%carried.1), index=0
  ROOT %less = pred[]{:T(512)S(6)} compare(%i.1, %end), direction=LT
}

ENTRY %main (x0: f32[8,96], w0: f32[96,96], v0: f32[96,200]) -> f32[8,200] {
  %x0 = f32[8,96]{1,0:T(8,128)} parameter(0)
  %w0 = f32[96,96]{1,0:T(8,128)} parameter(1)
  %v0 = f32[96,200]{1,0:T(8,128)} parameter(2)
  %zero = s32[]{:T(128)} constant(0)
  %tuple.2 = (s32[]{:T(128)}, f32[8,96]{1,0}, f32[96,96]{1,0}) tuple(%zero, %x0, %w0)
  %while.1 = (s32[]{:T(128)}, f32[8,96]{1,0}, f32[96,96]{1,0}) while(%tuple.2), \
condition=%condition, body=%body
  %adversarial = f32[8,96]{1,0:T(8,128)} get-tuple-element(%while.1), index=1
  %kernel.2 = f32[8,96]{1,0:T(8,128)} custom-call(%adversarial), custom_call_target=\
"tpu_custom_call", frontend_attributes={kernel_metadata={"cycles":"40"}}, metadata={op_name=\
"jit(step)/jvp()/pallas_call" stack_frame_id=3}
  %last = f32[8,200]{1,0:T(8,128)} convolution(%kernel.2, %v0), dim_labels=bf_io->bf, metadata=\
{op_name="jit(step)/transpose(jvp())/dot_general" stack_frame_id=2}, backend_config=\
{"estimated_cycles":"90"}
  ROOT %scaled = f32[8,200]{1,0:T(8,128)} multiply(%last, %last), metadata={op_name=\
"jit(step)/optimiser/mul"}, backend_config={"estimated_cycles":"9"}
}
"""
WANTED = {  # part: {kind: (bytes, cycles)}
    "attack forward": {
        "matrix product": (5 * (2 * ROW + SQUARE), 5 * 100),
        "copy": (5 * 2 * ROW, 5 * 30),  # it says nothing of itself; the product uses it
    },
    "attack backward": {"softmax": (5 * 2 * ROW, 5 * 7)},
    "forward": {"attention": (2 * ROW, 40)},  # the kernel, by what its file declares
    "backward": {"matrix product": (ROW + WIDE + 2 * ROW, 90)},
    "optimiser": {"element-wise": (3 * 2 * ROW, 9)},
}


class PartsTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.found = parts.figures(hlo.parse(TEXT))

    @sweeps.rows(*WANTED)
    def test_a_hand_count(self, part):
        kinds = self.found["by_part"][part]
        counted = {kind: (share["bytes"], share["cycles"]) for kind, share in kinds.items()}
        self.assertEqual(counted, WANTED[part])

    def test_what_counts_the_loop_is_in_no_part(self):
        other = self.found["by_part"].pop("other", {})
        self.assertEqual(sum(share["cycles"] for share in other.values()), 0)
        self.assertContainsSubset(WANTED, self.found["by_part"])

    def test_the_heaviest_lines_of_source(self):
        first, second = self.found["heaviest"][:2]
        self.assertEqual(first["line"], "models/families/vit.py:69 Mlp.__call__")
        self.assertEqual(
            (first["part"], first["cycles"], first["instructions"]), ("attack forward", 500, 1)
        )
        self.assertEqual((second["kind"], second["cycles"]), ("copy", 150))

    def test_lines_for_people(self):
        text = "\n".join(parts.lines(self.found))
        self.assertIn("attack forward   matrix product", text)
        self.assertRegex(text, r"attack forward, matrix product: .*vit.py:69 Mlp.__call__ \(1\)")

    def test_a_text_without_frames(self):
        head, _, rest = TEXT.partition("FileNames")
        module = hlo.parse(head + rest[rest.index("%fused_product") :])
        self.assertEmpty(module.frames)
        row = parts.heaviest(module)[0]
        self.assertEqual(
            (row.part, row.kind, row.line), ("attack forward", "matrix product", "product")
        )


def row(part, kind, line, instructions, bytes, cycles):
    """A row without a GPU's figures."""
    return parts.Heavy(part, kind, line, instructions, instructions, bytes, cycles, 0, 0)


class SumsTest(absltest.TestCase):
    """Bytes and cycles of instructions, added up and put in order."""

    def put(self, *rows: tuple) -> None:
        heavy = [row(*each) for each in rows]
        self.enter_context(mock.patch.object(parts, "each", lambda module, gpu: iter(heavy)))

    def test_what_takes_the_most_cycles_is_first(self):
        self.put(
            ("backward", "copy", "b", 1, 100, 3),
            ("forward", "norm", "a", 1, 10, 5),
            ("forward", "norm", "c", 1, 1, 12),
            ("forward", "norm", "a", 1, 20, 7),
        )
        shares = [row("forward", "norm", "a", 3, 31, 24), row("backward", "copy", "b", 1, 100, 3)]
        self.assertEqual(parts.shares(None), shares)
        rows = [
            row("forward", "norm", "a", 2, 30, 12),
            row("forward", "norm", "c", 1, 1, 12),  # of equal cycles the most bytes first
            row("backward", "copy", "b", 1, 100, 3),
        ]
        self.assertEqual(parts.heaviest(None), rows)
        self.assertEqual(parts.heaviest(None, 2), rows[:2])

    def test_twenty_are_listed(self):
        self.put(*(("forward", "norm", str(n), 1, 1, n) for n in range(25)))
        found = [row.line for row in parts.heaviest(None)]
        self.assertEqual(found, [str(n) for n in range(24, 4, -1)])


class KindsTest(parameterized.TestCase):
    @sweeps.rows(
        (attention.self_attention, "attention"),
        (channel_attention.self_cross_covariance, "attention"),
        (talking_heads.talking_heads, "attention"),
        (convnext_layers.convnext_block, "depthwise"),
        (convnext_layers.norm_halving, "convolution"),
        (local_interaction.local_interaction, "depthwise"),
        (stem_layers.stem_layers, "convolution"),
        (stem_layers.batch_stem_layers, "convolution"),
    )
    def test_what_kernels_count_as(self, function, kind):
        """By the name of the function that calls them, or by its file's."""
        module = mock.Mock(stack=lambda frame: [(function.__name__, "", 1, 1)])
        found = parts._function_kind(module, 1)
        self.assertEqual(found, kind)
