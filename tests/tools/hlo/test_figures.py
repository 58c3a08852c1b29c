"""Figures for people of programs for chips that are not here, from costs written by hand."""

import contextlib
import io
from unittest import mock

from absl.testing import absltest

from jaxrobust.doctor.programs import hlo, topology
from tests.support.programs import CHIP, COSTS
from tools.hlo import figures, overlap, parts

FIGURES = COSTS | {
    "instructions": 12345,
    "in_flight": [
        {"kind": "all-gather", "sent": 1e7, "cycles": 500_000.0, "row": False},
        {"kind": "all-reduce", "sent": 2e7, "cycles": 1e9, "row": True},
    ],
    "collectives": [
        {"kind": "all-gather", "in_attack_loop": False, "count": 2, "arrays": 5, "bytes": 3e6},
        {"kind": "all-reduce", "in_attack_loop": True, "count": 1, "arrays": 1, "bytes": 1e6},
    ],
    "collectives_in_attack_loop": 1,
    "parameters_gathered_more_than_once": ["a", "b", "c", "d", "e", "f"],
}


class ReadTest(absltest.TestCase):
    """The messages of a program, summed up."""

    def collective(self, kind="all-gather", times=1, inside=False, row=False, parameters=()):
        texts = {"op_name": "", "parameters": tuple(parameters), "key": "", "row": row}
        sizes = {"kind": kind, "bytes": 100, "sent": 10.0, "arrays": 2, "times": times}
        return hlo.Collective(**sizes, inside=inside, **texts)

    def read(self, *collectives) -> dict:
        with (
            mock.patch.object(hlo, "collectives", return_value=list(collectives)),
            mock.patch.object(parts, "figures", return_value={}),
            mock.patch.object(overlap, "in_flight", return_value=[]),
        ):
            return figures.read(mock.Mock(computations={}))

    def test_a_loop_of_unknown_length_counts_once(self):
        found = self.read(self.collective(times=3), self.collective(times=None, row=True))
        (row,) = found["collectives"]
        self.assertEqual((row["count"], row["arrays"], row["bytes"]), (2, 4, 400))

    def test_kinds_inside_and_outside_of_the_attack(self):
        inside = self.collective("all-reduce", inside=True)
        found = self.read(inside, self.collective(), self.collective("all-reduce"), inside)
        rows = [(r["kind"], r["in_attack_loop"], r["count"]) for r in found["collectives"]]
        expected = [("all-gather", False, 1), ("all-reduce", False, 1), ("all-reduce", True, 2)]
        self.assertEqual(rows, expected)
        self.assertEqual(found["collectives_in_attack_loop"], 2)

    def test_parameters_that_are_gathered_again(self):
        found = self.read(
            self.collective(parameters=["once", "twice"]),
            self.collective(parameters=["twice"]),
            self.collective(parameters=["again and again"], times=None),
            self.collective(parameters=["in a loop"], times=5),
            self.collective(parameters=["never"], times=0),
        )
        more = ["again and again", "in a loop", "twice"]
        self.assertEqual(found["parameters_gathered_more_than_once"], more)
        self.assertEqual(found["parameters_gathered"], 5)


class ShowTest(absltest.TestCase):
    def test_hidden_bytes(self):
        found = figures.hidden(FIGURES, CHIP)
        # The first lasts for half of its bytes; the second, at half of the links, for all.
        self.assertAlmostEqual(found["hidden_bytes"], 5e6 + 2e7)
        self.assertAlmostEqual(found["hidden_share"], 2.5e7 / 4e7)
        self.assertEqual(figures.hidden(FIGURES, CHIP._replace(clock=None)), {})
        self.assertEqual(figures.hidden(FIGURES | {"sent_bytes": 0}, CHIP), {})

    def shown(self, chip, costs=FIGURES):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            found = figures.show(costs, chip, flops=2e9, images=8)
        return found, printed.getvalue()

    def test_for_people(self):
        found, text = self.shown(CHIP)
        self.assertEqual(found["memory_bytes"], topology.memory_of(FIGURES))
        self.assertEqual(found["chip_memory_bytes"], CHIP.memory)
        self.assertEqual(found["bound_by"], "hbm")
        for line in (
            "  traced in 1.2 s, compiled in 12.5 s; 12,345 instructions\n",
            "  memory per chip: 3.50 of 16 GiB (1.00 argument, 0.50 output, 2.00 temporary, 0.00",
            "  2 all-gather of 5 arrays, 3.0 MB\n",
            "  1 all-reduce of 1 arrays, 1.0 MB, IN THE ATTACK LOOP\n",
            "  collectives in the attack loop: 1\n",
            "  GATHERED MORE THAN ONCE: a, b, c, d, e, ...\n",
            "  0.002 TFLOP per chip and step of the model, 1.50 of that in the executable\n",
            "  kernel k: 3 calls of 2,000,000 cycles, 5.0 MB, 7.0 GFLOP, as its file says\n",
            "  40.0 MB sent by a chip, 30.0 MB of that during other work, 62% hidden behind it\n",
            "  roofline, not measured: 10.0 ms per step, 800 images/s per chip, bound by hbm "
            "(flops 2.0 ms, hbm 10.0 ms, cycles 7.0 ms, ici 5.0 ms)\n",
        ):
            self.assertIn(line, text)

    def test_of_an_unknown_chip(self):
        found, text = self.shown(None, FIGURES | {"parameters_gathered_more_than_once": ["a"]})
        memory = topology.memory_of(FIGURES)
        self.assertEqual(found, {"memory_bytes": memory, "chip_memory_bytes": None})
        self.assertIn("memory per chip: 3.50 GiB (", text)
        self.assertIn("MORE THAN ONCE: a\n", text)
        self.assertNotIn("roofline", text)
