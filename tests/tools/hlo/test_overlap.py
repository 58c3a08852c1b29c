"""What runs next to collectives, counted by hand in texts as the TPU compiler writes them."""

from types import SimpleNamespace
from unittest import mock

from absl.testing import absltest

from jaxrobust.doctor.programs import hlo, topology
from jaxrobust.runtime.devices.hardware import Chip
from tools.hlo import figures, overlap

SIZE = 64 * 128 * 4  # bytes of every array
ARRAY = "f32[64,128]{1,0:T(8,128)}"
ALL = "replica_groups=[1,16]<=[16], to_apply=%add"
ROW = "replica_groups=[4,4]<=[16], to_apply=%add"


def cycles(n):
    return f', backend_config={{"window_config":{{"estimated_cycles":"{n}"}}}}'


def chain(n, end, opcode="all-reduce", groups=ALL):
    """Two computations: the start, or the end, of a chain of fusions."""
    name = f"{end}_{n}"
    return f"""
%{name} (p.{name}: f32[64,128]) -> f32[64,128] {{
  %p.{name} = {ARRAY} parameter(0)
  %sum.{name} = {ARRAY} {opcode}(%p.{name}), channel_id=1, {groups}, frontend_attributes=\
{{chain_id="{n}"}}
  ROOT %call.{name} = {ARRAY} custom-call(%sum.{name}), custom_call_target="AsyncCollective{end}"
}}
"""


# Of the collectives of 16 chips: one waits (A); one goes around a product and a loop (B), where for
# the loop's 3 x 50 cycles another one is under way (C); one has nothing between its ends (D); one
# is a start and an end of the classic kind (E), one a computation (F).
TEXT = (
    "HloModule jit_step, is_scheduled=true, num_partitions=16\n"
    + """
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add.1 = f32[] add(%a, %b)
}
"""
    + "".join(chain(n, end) for n in (1, 3) for end in ("Start", "Done"))
    + chain(2, "Start", groups=ROW)
    + chain(2, "Done", groups=ROW)
    + f"""
%product (p.0: f32[64,128]) -> f32[64,128] {{
  %p.0 = {ARRAY} parameter(0)
  ROOT %tanh.1 = {ARRAY} tanh(%p.0)
}}

%body (c.0: (s32[], f32[64,128])) -> (s32[], f32[64,128]) {{
  %c.0 = (s32[], {ARRAY}) parameter(0)
  %c.1 = s32[] get-tuple-element(%c.0), index=0
  %c.2 = {ARRAY} get-tuple-element(%c.0), index=1
  %c.3 = {ARRAY} fusion(%c.2), kind=kLoop, calls=%product{cycles(50)}
  ROOT %c.4 = (s32[], {ARRAY}) tuple(%c.1, %c.3)
}}

%condition (d.0: (s32[], f32[64,128])) -> pred[] {{
  %d.0 = (s32[], {ARRAY}) parameter(0)
  ROOT %d.1 = pred[] constant(false)
}}

%wrapped (w.0: f32[64,128]) -> f32[64,128] {{
  %w.0 = {ARRAY} parameter(0)
  ROOT %w.1 = {ARRAY} collective-permute(%w.0), source_target_pairs={{{{0,1}}}}
}}

ENTRY %main (x: f32[64,128]) -> f32[64,128] {{
  %x = {ARRAY} parameter(0)
  %A = {ARRAY} all-reduce(%x), channel_id=1, {ALL}
  %first = {ARRAY} fusion(%x), kind=kOutput, calls=%product{cycles(1000)}
  %B.1 = {ARRAY} fusion(%x), kind=kCustom, calls=%Start_1
  %second = {ARRAY} fusion(%x), kind=kOutput, calls=%product{cycles(400)}
  %C.1 = {ARRAY} fusion(%x), kind=kCustom, calls=%Start_2
  %zero = s32[] constant(0)
  %t = (s32[], {ARRAY}) tuple(%zero, %second)
  %loop = (s32[], {ARRAY}) while(%t), condition=%condition, body=%body, \
backend_config={{"known_trip_count":{{"n":"3"}}}}
  %C.2 = {ARRAY} fusion(%C.1), kind=kCustom, calls=%Done_2
  %B.2 = {ARRAY} fusion(%B.1), kind=kCustom, calls=%Done_1
  %D.1 = {ARRAY} fusion(%x), kind=kCustom, calls=%Start_3
  %D.2 = {ARRAY} fusion(%D.1), kind=kCustom, calls=%Done_3
  %E.1 = ({ARRAY}, {ARRAY}) all-gather-start(%x), channel_id=1, replica_groups=[1,16]<=[16], \
dimensions={{0}}
  %third = {ARRAY} fusion(%x), kind=kOutput, calls=%product{cycles(60)}
  %E.2 = {ARRAY} all-gather-done(%E.1)
  %F.1 = (({ARRAY}), {ARRAY}, u32[]) async-start(%x), calls=%wrapped
  %F.2 = (({ARRAY}), {ARRAY}, u32[]) async-update(%F.1)
  %fourth = {ARRAY} fusion(%x), kind=kOutput, calls=%product{cycles(90)}
  %F.3 = {ARRAY} async-done(%F.2)
  ROOT %last = {ARRAY} fusion(%F.3), kind=kOutput, calls=%product{cycles(2000)}
}}
"""
)


class OverlapTest(absltest.TestCase):
    def test_work_between_a_start_and_its_end(self):
        found = overlap.in_flight(hlo.parse(TEXT))
        expected = [
            ("all-reduce", 2 * SIZE * 15 / 16, 400 + 3 * 50 / 2, False),  # B
            ("all-reduce", 2 * SIZE * 15 / 16, 0, False),  # D
            ("all-reduce", 2 * SIZE * 3 / 4, 3 * 50 / 2, True),  # C, in rows of four chips
            ("collective-permute", SIZE, 90, False),  # F
            ("all-gather", SIZE * 15 / 16, 60, False),  # E
        ]
        self.assertEqual(found, expected)

    def test_a_loop_that_is_not_known_counts_once(self):
        def collective(key, times, row=False):
            about = {"bytes": 9, "sent": 10.0, "arrays": 1, "inside": True, "op_name": ""}
            return hlo.Collective(
                kind=f"kind {key}", times=times, key=key, row=row, parameters=(), **about
            )

        found = [collective("a", None), collective("b", 3, True), collective("c", 2)]
        found.append(collective("a", 1))
        beside = {"one": {"a": 50.0}, "two": {"b": 7.0}}
        with (
            mock.patch.object(hlo, "collectives", return_value=found),
            mock.patch.object(overlap, "_beside", lambda module, name, gpu: beside[name]),
        ):
            made = overlap.in_flight(SimpleNamespace(computations=beside))
        a, b = ("kind a", 10.0, 50.0, False), ("kind b", 30.0, 21.0, True)
        self.assertEqual(made, [a, b, a])

    def test_bytes_are_hidden_as_long_as_the_work_lasts(self):
        """At 1,000 bytes a cycle, and half of that in a row of the slice."""
        chip = Chip(1e12, 2**30, 1e9, interconnect=1e9, clock=1e6)
        module = hlo.parse(TEXT)
        costs = topology.costs(module) | figures.read(module)
        bounds = topology.roofline(costs, chip, flops=1.0, images=1)
        found = figures.hidden(costs, chip)
        # B: longer than it takes; D: nothing; C: 75 cycles at half the speed; E and F: whole.
        hidden = 2 * SIZE * 15 / 16 + 37_500 + SIZE + SIZE * 15 / 16
        self.assertEqual(found["hidden_bytes"], hidden)
        sent = 3 * 2 * SIZE * 15 / 16 + 2 * SIZE * 3 / 4 + SIZE + SIZE * 15 / 16
        self.assertEqual((costs["sent_bytes"], costs["row_bytes"]), (sent, 2 * SIZE * 3 / 4))
        self.assertEqual(found["hidden_share"], hidden / sent)
        self.assertEqual(bounds["ici_s"], (sent + 2 * SIZE * 3 / 4) / 1e9)

    def test_what_a_loop_sends_counts_each_time(self):
        before = topology.costs(hlo.parse(TEXT))
        for groups, share in ((ALL, 15 / 16), (ROW, 3 / 4)):
            inside = f"  %c.5 = {ARRAY} all-reduce(%c.2), channel_id=1, {groups}\n  %c.3 ="
            found = topology.costs(hlo.parse(TEXT.replace("  %c.3 =", inside)))
            more = 3 * 2 * SIZE * share
            self.assertEqual(found["sent_bytes"] - before["sent_bytes"], more)
            in_rows = found["row_bytes"] - before["row_bytes"]
            self.assertEqual(in_rows, more if groups is ROW else 0)

    def test_a_chain_without_its_start_waits(self):
        """As where the compiler gave up the schedule: the parts stay, and nothing is between."""
        text = TEXT.replace("AsyncCollectiveStart", "Sync")
        kinds = [each.kind for each in overlap.in_flight(hlo.parse(text))]
        self.assertEqual(kinds, ["collective-permute", "all-gather"])
