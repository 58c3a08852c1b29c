"""The file that `bench_gpu.py` goes on from, and its tables."""

import contextlib
import io
import json
from pathlib import Path
from unittest import mock

from absl.testing import absltest, parameterized

from tools import bench_gpu
from tools.gpu import figures, tables

HERE = {"GPU": "1 x NVIDIA H200", "driver": "580", "JAX": "0.11.2", "sources": "abc"}


def step(side, batch, turn, images_per_s, compile_s=1.0, network="vit_b_cvst"):
    of = {"network": network, "options": [], "what": "step"}
    figure = images_per_s and {
        "images_per_s": images_per_s,
        "compile_s": compile_s,
        "mfu": 0.25 if side == "jaxrobust" else None,
        "peak_memory": 7e9,
        "batch": batch,
        "device": "1 x NVIDIA H200",
    }
    of |= {"side": side, "batch": batch, "turn": turn}
    return {"of": of, "kind": f"{side} turn", "seconds": 3.0, "figure": figure}


STEPS = [
    step("jaxrobust", 32, 0, None),
    step("jaxrobust", 16, 0, 99.0, 90.0),
    step("PyTorch", 8, 0, 99.0, 60.0),
    step("jaxrobust", 8, 1, 150.0, 50.0),
    step("PyTorch", 8, 1, 100.0),
    step("jaxrobust", 16, 1, 200.0),
    step("jaxrobust", 8, 2, 170.0),
    step("PyTorch", 8, 2, 110.0),
    step("jaxrobust", 16, 2, 220.0),
]


class FileCase(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.path = Path(self.create_tempdir().full_path) / "new/gpu.jsonl"
        self.calls = []

    def opened(self, minutes=None, **differing):
        return figures.Figures(self.path, HERE | differing, minutes)

    def measured(self, kept, name, value=1.0, kind="turn", guess=None):
        def run():
            self.calls.append(name)
            return {"value": value}

        return kept.of({"what": name}, kind, run, guess)


class FileTest(FileCase):
    def test_goes_on(self):
        kept = self.opened()
        self.measured(kept, "a", 2.0)
        self.assertLen(self.path.read_text().splitlines(), 2)  # at once
        again = self.opened()
        self.assertEqual(self.measured(again, "a"), {"value": 2.0})
        self.assertEqual(self.measured(again, "b"), {"value": 1.0})
        self.assertEqual(self.calls, ["a", "b"])

    def test_what_did_not_fit_is_a_figure(self):
        kept = self.opened()
        kept.of({"what": "a"}, "turn", lambda: None)
        self.assertIsNone(self.measured(self.opened(), "a"))
        self.assertEmpty(self.calls)

    def test_a_failure_is_none(self):
        with self.assertRaises(RuntimeError):
            self.opened().of({"what": "a"}, "turn", mock.Mock(side_effect=RuntimeError))
        self.measured(self.opened(), "a")
        self.assertEqual(self.calls, ["a"])

    def test_a_torn_line_is_cut_off_and_said(self):
        self.measured(self.opened(), "a")
        whole = self.path.read_bytes()
        self.path.write_bytes(whole + b'{"of": {"what": "b"}, "kin')
        with contextlib.redirect_stderr(io.StringIO()) as err:
            kept = self.opened()
        self.assertEqual(err.getvalue(), f"{self.path}: its last line was torn, and is cut off\n")
        self.assertEqual(self.path.read_bytes(), whole)
        self.measured(kept, "b")
        self.assertEqual([row["of"]["what"] for row in self.opened().rows], ["a", "b"])

    def test_a_first_line_that_was_torn(self):
        self.opened()
        self.path.write_bytes(self.path.read_bytes()[:20])
        with contextlib.redirect_stderr(io.StringIO()):
            self.opened()
        self.assertEqual(figures.read(self.path), (HERE, []))

    @parameterized.parameters(
        ({"JAX": "0.12.0"}, r"JAX 0\.11\.2 \(here 0\.12\.0\)"),
        (
            {"GPU": "2 x NVIDIA H200", "sources": "def"},
            r"GPU 1 x NVIDIA H200 \(here 2 x NVIDIA H200\), sources abc \(here def\)",
        ),
    )
    def test_of_another_machine(self, differing, words):
        self.opened()
        with self.assertRaisesRegex(
            ValueError,
            rf"^--resume={self.path} is of another machine or other sources: {words}; go on there, "
            "or name a new file$",
        ):
            self.opened(**differing)

    @parameterized.parameters(
        ('{"a": 1}\n', "holds no figures of bench_gpu.py; name another file"),
        ('{"machine": "other"}\n', "holds no figures of bench_gpu.py; name another file"),
        ("words\nwords\n", "line 1 is damaged .*; remove that line"),
    )
    def test_no_such_file(self, text, words):
        self.path.parent.mkdir()
        self.path.write_text(text)
        with self.assertRaisesRegex(ValueError, f"^{self.path}.* ?{words}$"):
            self.opened()

    def test_machine(self):
        here = figures.machine()
        self.assertSameElements(here, ["GPU", "driver", "JAX", "jaxlib", "PyTorch", "sources"])
        self.assertRegex(here["sources"], "^[0-9a-f]{12}$")


class MinutesTest(FileCase):
    def test_begins_nothing_that_would_end_later(self):
        kept = self.opened(minutes=1)
        self.measured(kept, "a", kind="jaxrobust turn", guess=59)
        with self.assertRaisesRegex(figures.NoTime, r"^b, jaxrobust, batch 4 \(about 61 s\)$"):
            kept.of({"what": "b", "side": "jaxrobust", "batch": 4}, "PyTorch turn", None, 61)
        with self.assertRaisesRegex(figures.NoTime, r"^c \(about 150 s\)$"):  # GUESSED_S
            self.measured(kept, "c", kind="jaxrobust first")
        # What a kind took counts more than a guess.
        self.measured(kept, "d", kind="jaxrobust turn", guess=100)
        self.assertEqual(self.calls, ["a", "d"])
        self.assertBetween(kept.limit(), 80, 90)
        self.assertIsNone(self.opened().limit())

    def test_takes_the_longest_of_a_kind(self):
        self.opened()
        with self.path.open("a") as lines:
            for seconds in (20.0, 70.0):
                row = {"of": {"what": seconds}, "kind": "jaxrobust turn"}
                lines.write(json.dumps(row | {"seconds": seconds, "figure": None}) + "\n")
        kept = self.opened(minutes=1)
        self.assertEqual(kept.expected("jaxrobust turn"), 70)
        with self.assertRaises(figures.NoTime):
            self.measured(kept, "a", kind="jaxrobust turn")

    def test_what_is_left_and_what_failed(self):
        jobs = [
            ("a", mock.Mock(side_effect=figures.NoTime("step, batch 4 (about 60 s)"))),
            ("b", mock.Mock(side_effect=RuntimeError("no rounding"))),
            ("b", mock.Mock(side_effect=ValueError("no pyautoattack"))),
            ("c", mock.Mock()),
        ]
        with contextlib.redirect_stderr(io.StringIO()) as err:
            left, failed = bench_gpu.work(iter(jobs))
        self.assertEqual((left, failed), (["a: step, batch 4 (about 60 s)"], ["b", "b"]))
        self.assertEqual(
            err.getvalue(), "bench_gpu: b: no rounding\nbench_gpu: b: no pyautoattack\n"
        )
        jobs[3][1].assert_called_once_with()


class TablesTest(absltest.TestCase):
    def test_summary(self):
        sums = tables.summary(STEPS)
        rows = {(r["side"], r["batch"]): r for r in sums["rows"]}
        self.assertSameElements(rows, [("jaxrobust", 8), ("jaxrobust", 16), ("PyTorch", 8)])
        self.assertEqual(rows["jaxrobust", 16]["rounds"], [200.0, 220.0])
        self.assertEqual(rows["jaxrobust", 16]["images_per_s"], 210.0)
        # The first process of a batch compiles: the search, or the first turn.
        compiled = {key: r["compile_s"] for key, r in rows.items()}
        self.assertEqual([*compiled.values()], [90.0, 60.0, 50.0])
        self.assertEqual(sums["ratio_largest"], 2.0)
        self.assertAlmostEqual(sums["ratio_same_batch"], 160 / 105)
        self.assertIsNone(tables.summary(STEPS[:3]))

    def test_report_of_a_part(self):
        text = tables.report(HERE, STEPS[:4])
        self.assertRegex(text, "^Measured on: GPU 1 x NVIDIA H200, driver 580, JAX 0.11.2, sources")
        self.assertIn("| vit_b_cvst | jaxrobust | 8 | 150.0 | 25.0% | 7.0 | 50 |", text)
        self.assertIn("| vit_b_cvst |  |  |", text)  # no ratio yet

    def test_report(self):
        about = {"network": "vit_b_cvst", "options": []}
        errors = {"jaxrobust": 0.0114, "PyTorch": 0.0071, "between": 0.0109}
        faster = {"images_per_s": 231.0}
        refused = {"refused": "Unknown flag | --b"}
        attack = {"wall_s": 4.0, "compile_s": None, "forward": 300, "backward": 100, "robust": 8}
        ours = attack | {"attacks_s": 2.5, "first_s": 3.5, "compile_s": 9.0}
        more = [
            ({"what": "logits", "variant": ""}, errors),
            ({"what": "variant", "variant": "latency hiding", "batch": 16}, faster),
            ({"what": "variant", "variant": "other flag", "batch": 16}, refused),
            ({"what": "variant", "variant": "large", "batch": 16}, None),
            ({"what": "autoattack", "variant": "short", "side": "PyTorch", "batch": 8}, attack),
            ({"what": "autoattack", "variant": "short", "side": "jaxrobust", "batch": 8}, ours),
        ]
        rows = [{"of": about | of, "kind": "", "figure": figure} for of, figure in more]
        text = tables.report(HERE, [*STEPS, *rows])
        for line in (
            "| vit_b_cvst | 0.0114 | 0.0071 | 0.0109 |",
            "| vit_b_cvst | jaxrobust | 16 | 210.0 | 25.0% | 7.0 | 90 |",
            "| vit_b_cvst | PyTorch | 8 | 105.0 |  | 7.0 | 60 |",
            "| vit_b_cvst | 2.00 | 1.52 |",
            "| vit_b_cvst | latency hiding | 16 | 231.0 | 1.100 |",
            "| vit_b_cvst | other flag | 16 |  | Unknown flag / --b |",
            "| vit_b_cvst | large | 16 |  | out of memory |",
            "| vit_b_cvst | short | PyTorch | 8 | 4.0 |  |  |  | 100 |",
            "| vit_b_cvst | short | jaxrobust | 8 | 4.0 | 2.5 | 3.5 | 9.0 | 100 |",
        ):
            self.assertIn(line, text.splitlines())


if __name__ == "__main__":
    absltest.main()
