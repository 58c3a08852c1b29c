"""What TensorBoard and W&B hold of a run, read by their own readers, and what goes wrong there."""

import contextlib
import io
import json
import subprocess
import sys
import types
from pathlib import Path
from unittest import mock

import pytest
from absl.testing import absltest

from jaxrobust.runtime.text import raster
from jaxrobust.training.run import metrics, trackers
from tests.support.modules import hidden, needs
from tests.support.recorder import DOT, Recorder

RESVG = needs("resvg_py", "pip install resvg-py")


class TrackersCase(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.workdir = Path(self.create_tempdir().full_path)
        self.said = io.StringIO()
        self.enter_context(contextlib.redirect_stderr(self.said))

    def kinds(self, **recorders):
        kinds = {
            name: trackers.TrackerKind("json", lambda: None, one.opened)
            for name, one in recorders.items()
        }
        self.enter_context(mock.patch.dict(trackers.KINDS, kinds))

    def open(self, *names, about=None, draw=None):
        log = trackers.Trackers(self.workdir, list(names), about, draw)
        log.open()
        return log

    def write(self, log, phase, start, steps, *, before=0, loss=lambda step: step / 2):
        run = types.SimpleNamespace(
            workdir=self.workdir, name=phase, trackers=log, earlier_steps=before
        )
        write = metrics.writer(run, start, enabled=True)
        for step in steps:
            write(step, {"loss": loss(step)})


class FailureTest(TrackersCase):
    def test_one_that_fails_is_left_out_and_said_once(self):
        good, bad = Recorder(), Recorder(broken=2)
        self.kinds(good=good, bad=bad)
        log = self.open("bad", "good")
        self.write(log, "train", 0, [1, 2, 3])
        log.close(ended=True)
        self.assertEqual([m["step"] for m in bad.scalars_of], [1])
        self.assertEqual([m["step"] for m in good.scalars_of], [1, 2, 3])
        self.assertLen((self.workdir / "metrics.jsonl").read_text().splitlines(), 3)
        self.assertEqual(self.said.getvalue().count("WARNING"), 1)
        self.assertIn("bad is disabled from here on", self.said.getvalue())
        self.assertIn("OSError: the network is gone", self.said.getvalue())
        self.assertEqual((bad.closed, good.closed), ([False], [True]))

    def test_what_a_tracker_has_seen_is_of_its_phase(self):
        rows = [
            {"phase": "pretrain", "step": 90, "loss": 1.0, "clean": 0.5},
            {"phase": "train", "step": 20, "loss": 1.0},
            {"phase": "train", "step": 40, "robust": 0.2},
            {"phase": "train", "step": 30, "loss": 1.0},  # of a run that went back
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (self.workdir / "metrics.jsonl").write_text(lines)
        tracker = mock.Mock()
        kind = trackers.TrackerKind("json", lambda: None, lambda *_: tracker)
        with mock.patch.dict(trackers.KINDS, {"one": kind}):
            self.open("one").begin("train", 35, 90)
        seen = {"phase": 40, "step": 40, "loss": 30, "robust": 40}
        tracker.begin.assert_called_once_with("train", 35, 90, seen)

    def test_one_that_does_not_open_is_left_out(self):
        def opened(workdir, about):
            raise OSError("no room")

        with mock.patch.dict(
            trackers.KINDS, {"bad": trackers.TrackerKind("json", lambda: None, opened)}
        ):
            log = self.open("bad")
        self.write(log, "train", 0, [1])
        self.assertIn("bad is disabled from here on", self.said.getvalue())

    @RESVG
    def test_figures_that_cannot_be_drawn_are_said_once(self):
        def draw(workdir, phase):
            raise KeyError("loss")

        recorder = Recorder()
        self.kinds(recorder=recorder)
        log = self.open("recorder", draw=draw)
        self.write(log, "train", 0, [1])
        log.pictures(1)
        log.pictures(2)
        log.scalars(3, {"loss": 1.0})
        self.assertEqual(self.said.getvalue().count("pictures are no longer logged: KeyError"), 1)
        self.assertEqual([m["step"] for m in recorder.scalars_of], [1, 3])

    def test_without_resvg_a_sentence_and_no_pictures(self):
        recorder = Recorder()
        self.kinds(recorder=recorder)
        with hidden("resvg_py"):
            log = self.open("recorder", draw=lambda *where: {"dot": DOT})
            self.write(log, "train", 0, [1])
            log.pictures(1)
        self.assertIn("log.to=recorder: drawing pictures requires resvg", self.said.getvalue())
        self.assertIn("pip install resvg-py", self.said.getvalue())
        self.assertEqual((recorder.images, len(recorder.scalars_of)), ([], 1))


@needs("tensorboardX", "pip install 'jaxrobust[tensorboard]'")
class TensorBoardTest(TrackersCase):
    def read(self, phase):
        try:
            from tensorboard.backend.event_processing import event_accumulator
        except ImportError:
            self.skipTest("needs tensorboard: pip install 'jaxrobust[tensorboard]'")
        read = event_accumulator.EventAccumulator(str(self.workdir / "tensorboard" / phase))
        return read.Reload()

    def test_a_run_that_goes_back_has_each_step_once(self):
        """As metrics.jsonl: steps behind the checkpoint are written again."""
        log = self.open("tensorboard")
        self.write(log, "pretrain", 0, [50])
        self.write(log, "train", 0, [5, 10, 15])
        self.write(log, "train", 5, [10, 15], loss=lambda step: 100.0)  # in the same second
        log.close(ended=False)
        log = self.open("tensorboard")
        self.write(log, "train", 10, [15, 20], loss=lambda step: 200.0)
        log.close(ended=True)
        seen = [(event.step, event.value) for event in self.read("train").Scalars("loss")]
        self.assertEqual(seen, [(5, 2.5), (10, 100.0), (15, 200.0), (20, 200.0)])
        lines = map(json.loads, (self.workdir / "metrics.jsonl").read_text().splitlines())
        said = [(m["step"], m["loss"]) for m in lines if m["phase"] == "train"]
        self.assertEqual(seen, said)
        self.assertEqual([e.step for e in self.read("pretrain").Scalars("loss")], [50])

    def test_the_config_is_a_table_of_hyper_parameters(self):
        """As TensorBoard's plugin reads it: also what is not a number, and the same of each
        part.
        """
        log = self.open("tensorboard", about={"train": {"lr": 0.5, "lr_steps": [1, 2]}, "seed": 3})
        self.write(log, "train", 0, [5])
        self.write(log, "train", 5, [10])
        log.close(ended=True)
        from tensorboard.plugins.hparams import plugin_data_pb2

        read = self.read("train")
        content = read.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
        values = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
        self.assertEqual(values["train.lr"].number_value, 0.5)
        self.assertEqual(values["train.lr_steps"].string_value, "[1, 2]")
        self.assertEqual(values["seed"].number_value, 3)
        self.assertEqual([event.step for event in read.Scalars("loss")], [5, 10])

    @RESVG
    def test_a_picture_is_read_back(self):
        log = self.open("tensorboard", draw=lambda *where: {"dot": DOT})
        self.write(log, "train", 0, [5])
        log.pictures(5)
        log.close(ended=True)
        (event,) = self.read("train").Images("figures/dot")
        self.assertEqual((event.step, event.width, event.height), (5, 8, 6))
        self.assertEqual(event.encoded_image_string, raster.png(DOT))

    def test_a_full_disk_stops_nothing(self):
        log = self.open("tensorboard")
        full = Path("/dev/full").open("wb")  # noqa: SIM115 - the tracker lets go of it
        with mock.patch("tensorboardX.record_writer.open_file", lambda path: full):
            self.write(log, "train", 0, range(1, 30))
        with contextlib.suppress(OSError):
            full.close()
        self.assertIn("No space left on device", self.said.getvalue())
        self.assertEqual(self.said.getvalue().count("WARNING"), 1)
        self.assertLen((self.workdir / "metrics.jsonl").read_text().splitlines(), 29)


class WandBRowsTest(absltest.TestCase):
    """What W&B is told; its run is made up."""

    def setUp(self):
        super().setUp()
        self.tracker = trackers._WandB.__new__(trackers._WandB)
        self.run = self.tracker._run = mock.Mock(step=0)
        self.tracker._image, self.tracker._first = mock.Mock(return_value="a picture"), True

    def told(self):
        rows = [(call.args[0], call.kwargs) for call in self.run.log.call_args_list]
        self.run.log.reset_mock()
        self.assertEqual([how.pop("commit") for _, how in rows], [True] * len(rows))
        return [(row, how["step"]) for row, how in rows]

    def test_a_run_that_goes_on_says_only_what_is_new(self):
        self.run.step = 400  # rows that are there
        self.tracker.begin("train", 5, 100, {"loss": 7, "top": 6})
        for step in (6, 7, 8):
            self.tracker.scalars(step, {"loss": step / 2, "top": step / 4})
        self.assertEqual(
            self.told(),
            [
                ({"step": 107, "train/step": 7, "train/top": 1.75}, 400),
                ({"step": 108, "train/step": 8, "train/loss": 4.0, "train/top": 2.0}, None),
            ],
        )

    def test_a_picture_unless_a_later_step_was_reached(self):
        with mock.patch.object(trackers.Image, "open", lambda file: file.read()):
            for seen, told in (({}, [0, 8]), ({"loss": 7, "top": 8}, [8]), ({"loss": 9}, [])):
                self.tracker.begin("train", 0, 0, seen)
                for step in (0, 8):
                    self.tracker.image(step, "dot", b"png")
                rows = [row for row, _ in self.told()]
                own = [{"step": s, "train/step": s, "train/dot": "a picture"} for s in told]
                self.assertEqual(rows, own)
        self.assertEqual({call.args for call in self.tracker._image.call_args_list}, {(b"png",)})

    def test_its_end(self):
        for ended, code in ((True, 0), (False, 1)):
            self.tracker.close(ended=ended)
            self.run.finish.assert_called_with(exit_code=code)


@needs("wandb", "pip install 'jaxrobust[wandb]'")
class WandBTest(TrackersCase):
    def setUp(self):
        super().setUp()
        offline = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_CONSOLE": "off"}
        self.enter_context(mock.patch.dict("os.environ", offline))

    def records(self):
        """The records of each part of the run, as W&B's own program reads them."""
        for path in sorted(self.workdir.glob("wandb/offline-run-*/*.wandb")):
            command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            yield [json.loads(line) for line in done.stdout.splitlines()]

    @RESVG
    @pytest.mark.slow
    def test_a_run_that_is_continued_is_one_run(self):
        def part(phase, start, steps, before):
            log = self.open("wandb", about={"parameters": 7}, draw=lambda *where: {"dot": DOT})
            if phase == "train":
                self.write(log, "pretrain", 0, [10])
            self.write(log, phase, start, steps, before=before)
            log.pictures(steps[-1])
            log.close(ended=False)

        part("train", 0, [5, 10], 10)
        part("train", 5, [10, 15], 10)  # step 10 is known there
        first, second = self.records()
        runs = [next(r["run"] for r in part if "run" in r) for part in (first, second)]
        own = (self.workdir / "wandb_id").read_text().strip()
        self.assertEqual([r["run_id"] for r in runs], [own, own])
        self.assertEqual(runs[0]["config"]["update"]["parameters"], 7)
        rows = [[r["history"]["item"] for r in part if "history" in r] for part in (first, second)]
        losses = [[(m["step"], m["train/loss"]) for m in own if "train/loss" in m] for own in rows]
        self.assertEqual(losses, [[(15, 2.5), (20, 5.0)], [(25, 7.5)]])
        self.assertEqual([m["step"] for m in rows[0] if "pretrain/loss" in m], [10])
        own = [m["_step"] for m in [*rows[0], *rows[1]]]
        self.assertEqual(own, sorted(set(own)))
        shown = [m for m in [*rows[0], *rows[1]] if "train/figures/dot.path" in m]
        self.assertEqual([m["train/step"] for m in shown], [10, 15])
        self.assertLen(list(self.workdir.glob("wandb/offline-*/files/media/images/**/*.png")), 2)

    def test_without_a_login_a_sentence(self):
        import wandb

        error = wandb.errors.UsageError("No API key configured. Use `wandb login` to log in.")
        with (
            mock.patch.dict("os.environ", {"WANDB_MODE": "online"}),
            mock.patch.object(wandb, "login", side_effect=error),
            self.assertRaisesRegex(ValueError, "log.to=wandb: W&B reports: No API key.*=offline"),
        ):
            trackers.check("wandb")
        trackers.check("wandb, wandb")  # offline nobody logs in

    def test_without_a_network_it_is_offline(self):
        import wandb

        modes = []

        def init(mode=None, **rest):
            modes.append(mode)
            if mode is None:
                raise wandb.errors.CommError("no such host")
            return mock.MagicMock(step=0)

        with mock.patch.object(wandb, "init", init), mock.patch.object(wandb, "teardown") as down:
            self.open("wandb")
        down.assert_called_once()
        self.assertEqual(modes, [None, "offline"])
        self.assertIn("W&B cannot be reached (CommError: no such host)", self.said.getvalue())
