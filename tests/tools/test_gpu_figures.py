"""The file that `bench_gpu.py` continues from, and its tables."""

import contextlib
import io
from pathlib import Path

from absl.testing import parameterized

from tools.gpu import figures

HERE = {"GPU": "1 x NVIDIA H200", "driver": "580", "JAX": "0.11.2", "sources": "abc"}


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

    def test_a_torn_line_is_cut_off_and_said(self):
        self.measured(self.opened(), "a")
        whole = self.path.read_bytes()
        self.path.write_bytes(whole + b'{"of": {"what": "b"}, "kin')
        with contextlib.redirect_stderr(io.StringIO()) as err:
            kept = self.opened()
        self.assertEqual(err.getvalue(), f"{self.path}: removed its last line, which was torn\n")
        self.assertEqual(self.path.read_bytes(), whole)
        self.measured(kept, "b")
        self.assertEqual([row["of"]["what"] for row in self.opened().rows], ["a", "b"])

    def test_of_another_machine(self):
        for differing, words in (
            ({"JAX": "0.12.0"}, r"JAX 0\.11\.2 \(here 0\.12\.0\)"),
            (
                {"GPU": "2 x NVIDIA H200", "sources": "def"},
                r"GPU 1 x NVIDIA H200 \(here 2 x NVIDIA H200\), sources abc \(here def\)",
            ),
        ):
            with self.subTest(row=(differing, words)):
                self.opened()
                with self.assertRaisesRegex(
                    ValueError,
                    rf"^--resume={self.path} is from a different machine or different sources: "
                    rf"{words}; continue there, or pass a new file$",
                ):
                    self.opened(**differing)

    def test_no_such_file(self):
        for text, words in (
            ('{"a": 1}\n', "has no figures from bench_gpu.py; pass a different file"),
            ('{"machine": "other"}\n', "has no figures from bench_gpu.py; pass a different file"),
            ("words\nwords\n", "line 1 is damaged .*; remove that line"),
        ):
            with self.subTest(row=(text, words)):
                self.path.parent.mkdir(exist_ok=True)
                self.path.write_text(text)
                with self.assertRaisesRegex(ValueError, f"^{self.path}.* ?{words}$"):
                    self.opened()
