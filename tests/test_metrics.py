from pathlib import Path

from absl.testing import absltest

from jaxrobust import metrics


class MetricsTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.workdir = Path(self.create_tempdir())
        self.path = self.workdir / "metrics.jsonl"

    def write(self, phase, start, steps):
        with metrics.writer(
            self.workdir, phase=phase, start=start, tensorboard=False, enabled=True
        ) as write:
            for step in steps:
                write(step, {"loss": step / 2})

    def test_resuming_leaves_each_step_once(self):
        self.write("pretrain", 0, [5])
        self.write("train", 0, [1, 2, 3])
        with self.path.open("a") as lines:
            lines.write('{"phase": "tra')  # killed while writing
        self.write("train", 1, [2, 3, 4])
        seen = [(row["phase"], row["step"]) for row in metrics.read(self.path)]
        expected = [("pretrain", 5), ("train", 1), ("train", 2), ("train", 3), ("train", 4)]
        self.assertEqual(seen, expected)

    def test_other_processes_write_nothing(self):
        with metrics.writer(
            self.workdir, phase="train", start=0, tensorboard=False, enabled=False
        ) as write:
            write(1, {"loss": 1.0})
        self.assertFalse(self.path.exists())

    def test_append_drops_a_line_cut_off(self):
        metrics.append(self.path, {"step": 1})
        with self.path.open("a") as lines:
            lines.write('{"st')
        metrics.append(self.path, {"step": 2})
        self.assertEqual(metrics.read(self.path), [{"step": 1}, {"step": 2}])

    def test_damaged_line_is_named(self):
        self.path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
        with self.assertRaisesRegex(ValueError, "metrics.jsonl, line 2 is damaged.*remove"):
            metrics.read(self.path)

    def test_replace_keeps_the_old_file_when_the_disk_is_full(self):
        self.path.write_text("old")
        with self.assertRaises(OSError):
            metrics.replace(self.path / "nowhere", "new")
        self.assertEqual(self.path.read_text(), "old")


if __name__ == "__main__":
    absltest.main()
