"""`--then`: what a stage is, what is refused before a training begins, and what it will cost."""

import json
from pathlib import Path
from unittest import mock

from absl.testing import absltest, parameterized

from jaxrobust.data.splits.subsets import ROBUSTBENCH_SHA256
from jaxrobust.doctor.estimate import account
from jaxrobust.doctor.estimate.devices import Target
from jaxrobust.publish import layouts
from jaxrobust.results.stages import checks, running, stage
from jaxrobust.results.stages.stage import ATTACK, EXPORT, SELECT, Stage
from jaxrobust.runtime.devices import hardware
from jaxrobust.types import Threat
from tests.support.runs import tiny

WHOLE = "select,autoattack:linf:4/255+l2:2+l1:75,export:hub,export:module:Me2026Robust_Net"


class ParseTest(parameterized.TestCase):
    def test_stages(self):
        first, second, third, fourth = stage.parse(WHOLE)
        words = WHOLE.split(",")
        threats = ("linf:4/255", "l2:2", "l1:75")
        self.assertEqual(
            [first, second, third, fourth],
            [
                Stage(words[0], "select"),
                Stage(words[1], "attack", "autoattack", threats),
                Stage(words[2], "export", layout="hub"),
                Stage(words[3], "export", layout="module", id="Me2026Robust_Net"),
            ],
        )
        self.assertEqual((first.kind, second.kind, third.kind), (SELECT, ATTACK, EXPORT))
        wanted = [Threat("linf", 4 / 255), Threat("l2", 2.0), Threat("l1", 75.0)]
        self.assertEqual(second.balls, wanted)
        self.assertEqual((third.layout, third.id), ("hub", None))
        self.assertEqual((fourth.layout, fourth.id), ("module", "Me2026Robust_Net"))
        (alone,) = stage.parse(" pgd-20 : Linf : 8/255 ")
        self.assertEqual((alone.attack, alone.balls), ("pgd-20", [Threat("linf", 8 / 255)]))
        self.assertEqual(alone.text, "pgd-20 : Linf : 8/255")
        self.assertEqual(stage.parse("clean"), [Stage("clean", "attack", "clean")])
        (published,) = stage.parse("export:Singh2023Revisiting_ViT-S-ConvStem")
        self.assertEqual(published.layout, "Singh2023Revisiting_ViT-S-ConvStem")

    def test_mistakes(self):
        for text, words in (
            ("autoatack", "'autoatack' is neither a stage nor an attack; did you mean autoattack?"),
            (
                "apgd-c:linf:1/255",
                "'apgd-c' is neither a stage nor an attack; did you mean apgd-ce?",
            ),
            ("selekt", "did you mean select?"),
            ("pgd-0", "'pgd-0' is neither a stage"),
            ("certificate", "is neither a stage nor an attack; one of select, export, autoattack,"),
            (
                "",
                "--then has an empty stage; write, for example, --then select,autoattack:linf:4",
            ),
            ("select,,export:hub", "has an empty stage"),
            ("autoattack:", "has nothing after its colon"),
            ("select:30", "select accepts nothing after a colon; leave it out"),
            ("autoattack:linf", "--then=linf has no radius; write linf:RADIUS, such as linf:4/255"),
            ("autoattack:l7:2", "the norm 'l7' is unknown; choose one of"),
            ("autoattack:linf:x", "is not a number; write one, or a fraction such as 4/255"),
            ("autoattack:linf:4/255+", "the norm '' is unknown"),
            ("autoattack:linf:4/255+linf:4/255", "repeats a threat; give it once"),
            ("clean:linf:4/255", "clean does not accept a threat; leave linf:4/255 out"),
            ("export", "the layout is missing; choose one of jaxrobust, timm, hub, module, sta"),
            ("export:hubb", "'hubb' is not a layout; did you mean hub?"),
            ("export:torch", "'torch' is not a layout; choose one of jaxrobust, timm, hub, module"),
            ("export:Singh2023Revisiting_ViT-S-ConvStm", "did you mean Singh2023Revisiting_ViT-S-"),
            ("export:hub,select", "select chooses the weights for export:hub; put it first"),
            ("clean,select", "select chooses the weights for clean; put it first"),
            ("select,select", "has select twice; give it once"),
            ("export:hub,export:hub", "has export:hub twice; give it once"),
            ("apgd-ce:l2:1+linf:.1,apgd-ce:linf:0.1+l2:1.0", "twice; give it once"),
            ("export:module:Me2026Robust,autoattack", "put autoattack before it"),
        ):
            with self.subTest(row=(text, words)):
                with self.assertRaises(ValueError) as caught:
                    stage.parse(text)
                self.assertIn(words, str(caught.exception))
                self.assertStartsWith(str(caught.exception), "--then")


class CheckTest(parameterized.TestCase):
    def refused(self, text, words, **changes):
        with self.assertRaises(ValueError) as caught:
            checks.check(tiny(**changes), stage.parse(text), Path("runs/x"))
        self.assertIn(words, str(caught.exception))
        self.assertStartsWith(str(caught.exception), f"--then={text.split(',')[-1]}: ")

    def test_what_can_work(self):
        text = "select,autoattack,pgd-5:l2:0.5,clean,export:hub,export:jaxrobust,export:module"
        checks.check(tiny(), stage.parse(text), Path("runs/x"))

    def test_a_choice_needs_images_that_test_nothing(self):
        for changes, words in (
            (
                {"data__selection_split": "test[:80]"},
                "split test[:80] is the test split test[:80], ",
            ),
            ({"data__selection_split": "test[40:90]"}, "may overlap with the test split"),
            ({"data__selection_split": ""}, "has no selection split to choose on; set data.select"),
        ):
            with self.subTest(row=(changes, words)):
                self.refused("select", words, **changes)
                self.refused("select", "set data.selection_split to", **changes)

    def test_radii(self):
        for text, words in (
            ("autoattack:l1:8/255", "an l1 radius of 0.03137 changes less than one pixel"),
            ("autoattack:linf:4", "larger than the pixel range"),
            ("autoattack:l2:50", "contains all 8x8 images"),
            ("apgd-ce:linf:0", "a radius of 0 is not an attack; write clean"),
        ):
            with self.subTest(row=(text, words)):
                with self.assertRaises(ValueError) as caught:
                    checks.check(tiny(), stage.parse(text), Path("runs/x"))
                self.assertIn(words, str(caught.exception))

    def test_several_norms_are_those_of_the_training(self):
        own = {"attack__norm": ("linf", "l2"), "attack__mix": "worst"}
        config = tiny(**own, attack__epsilon=(8 / 255, 0.5))
        checks.check(config, stage.parse("autoattack"), Path("runs/x"))
        words = "contains all 8x8 images"
        self.refused("autoattack", words, **own, attack__epsilon=(8 / 255, 50.0))

    def test_layouts(self):
        self.refused("export:timm", "this convnext_n has depths=")
        self.refused("export:Singh2023Revisiting_ViT-S-ConvStem", "is a vit_s_cvst, not a convnext")
        own = {"model__name": "examples/my_nets.py:make", "model__options": {}}
        self.refused("export:hub", "my_nets.py:make", **own)
        with mock.patch.object(checks.importlib.util, "find_spec", return_value=None):
            self.refused("export:module", layouts.NEEDS_TORCH)
            checks.check(tiny(), stage.parse("export:jaxrobust"), Path("runs/x"))

    def test_layouts_of_pytorchs_modules(self):
        name = "torch:examples/train_my_torch_network.py:build"
        own = {"model__name": name, "model__options": {}}
        for layout in ("jaxrobust", "state-dict", "robustbench"):
            checks.check(tiny(**own), stage.parse(f"export:{layout}"), Path("runs/x"))
        self.refused("export:hub", f"does not support {name}: choose --layout state-dict", **own)
        own["model__name"] = "torch:examples/none.py:build"
        self.refused("export:robustbench", "examples/none.py does not exist; run the", **own)

    def test_an_entry_of_robustbench_is_of_its_images_and_radius(self):
        text = "autoattack:linf:8/255,export:module:Me2026Robust"
        self.refused(text, "RobustBench would accept none of the preceding records: its data, dig")
        self.refused("autoattack,export:module:me", "is not a RobustBench id")
        self.refused("autoattack,export:jaxrobust:Me2026Robust", "choose export:module")


class EntryTest(absltest.TestCase):
    """On the images of RobustBench's list, which are not here."""

    def checked(self, text, images=5000, **changes):
        config = tiny(data__name="imagenet2012", attack__epsilon=4 / 255, **changes)
        source = mock.MagicMock(ids_sha256=ROBUSTBENCH_SHA256, image_shape=None)
        source.__len__.return_value = images
        stages = stage.parse(f"{text},export:module:Me2026Robust")
        with (
            mock.patch.object(checks.splits, "opened", return_value=source),
            mock.patch.object(checks.questions, "check"),
        ):
            checks.check(config, stages, Path("runs/x"))

    def test_the_trained_threat_or_one_of_several(self):
        self.checked("autoattack")
        self.checked("autoattack:l2:2+linf:4/255")
        with self.assertRaisesRegex(
            ValueError, r"RobustBench would accept none .*: its threats are .* not linf 4/2"
        ):
            self.checked("autoattack:linf:8/255")
        with self.assertRaisesRegex(ValueError, "its images are 0..99, not 0..4999. Leave Me2026"):
            self.checked("autoattack", test__images=100)
        with self.assertRaisesRegex(ValueError, "put autoattack before it"):
            self.checked("apgd-ce:linf:4/255")


class PreparedTest(absltest.TestCase):
    def test_a_choice_has_weights_to_choose_among(self):
        config = tiny(train__epochs=50)
        (said,) = checks.prepared(config, stage.parse("select,clean"))
        self.assertIn("checkpoint.keep_every_epochs becomes 5", said)
        self.assertEqual(config.checkpoint.keep_every_epochs, 5)
        self.assertEqual(checks.epochs_kept(config), 10)
        self.assertEqual(checks.prepared(config, stage.parse("select")), [])
        config = tiny()
        self.assertEqual(checks.prepared(config, stage.parse("clean")), [])
        self.assertEqual(config.checkpoint.keep_every_epochs, 0)

    def test_without_stages_nothing_is_asked(self):
        self.assertEqual(running.stages(None, None, Path("x"), estimate=True), [])


class CostTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.workdir = Path(self.create_tempdir().full_path) / "run"

    def test_what_it_costs_is_said_of_each_stage(self):
        found = {
            "training": {"seconds": 3600.0},
            "phases": [{"epochs": 4, "parts_s": {"selection": 8.0, "test": 22.0}}],
            "autoattack": {
                "robust": 0.5,
                "expected": {"seconds": 600.0},
                "at_most": {"seconds": 1200.0},
            },
        }
        config = tiny(checkpoint__keep_every_epochs=1, train__epochs=4)
        text = "select,autoattack:linf:.1+l2:1+l1:9,pgd-3,clean,export:hub"
        with mock.patch.object(checks.account, "account", return_value=found) as estimated:
            first, second = checks.lines(config, stage.parse(text), self.workdir)
            self.assertEqual(estimated.call_args.args, (config, checks.devices()))
            self.assertIsNone(estimated.call_args.kwargs["images"])
            checks.lines(config, stage.parse("clean"), self.workdir)
            self.assertEqual(estimated.call_args.kwargs["images"], 0)
        # Eight candidates under APGD of ten steps, which costs (3 x 10 + 2) / (3 x 2 + 2) of two's.
        for said in (
            "training 60.0 min; select 64.0 s; autoattack:linf:.1+l2:1+l1:9 30.0 min; pgd-3 22.0 s;"
            " clean 2.0 s; export:hub not estimated; total 91.5 min",
        ):
            self.assertIn(said, first)
        self.assertIn(
            "50% of the images are robust to each threat; if all are, it takes 2 times", second
        )

    def test_of_a_pod_it_is_computed_and_of_unknown_devices_it_is_not(self):
        with mock.patch.object(checks.jax, "process_count", return_value=4):
            (said,) = checks.lines(tiny(), stage.parse("clean"), self.workdir)
            self.assertRegex(said, r"cannot estimate the cost on \d x cpu, whose speed is unknown")
            device = mock.Mock(device_kind="TPU v5e")
            with mock.patch.object(checks.jax, "devices", return_value=[device]):
                on = checks.devices()
        chip = hardware.chip("TPU v5e")
        wanted = Target("TPU v5e", "TPU v5e", checks.jax.device_count(), chip, False, False)
        self.assertEqual(on, wanted)

    def test_nothing_is_compiled_for_it(self):
        measures = (mock.patch.object(account.here, "measured", side_effect=AssertionError),)
        measures += (mock.patch.object(account.attacked, "measured", side_effect=AssertionError),)
        with measures[0], measures[1]:
            text = "select,autoattack,export:hub"
            first, second = checks.lines(tiny(), stage.parse(text), self.workdir)
        self.assertRegex(first, r"estimated cost \(at 20% of the peak, .*\): training .*; total")
        self.assertIn("AutoAttack's time", second)
        self.assertGreater(checks.devices().chip.flops, 1e8)

    def test_it_is_said_once(self):
        with mock.patch.object(checks, "lines", return_value=["it costs"]) as asked:
            how = {"config": tiny(), "workdir": self.workdir}
            running.stages("clean", **how, estimate=False)
            self.assertEqual(asked.call_count, 0)
            running.stages("clean", **how, estimate=True)
            self.workdir.mkdir()
            (self.workdir / "config.json").write_text("{}")
            running.stages("clean", **how, estimate=True)  # it has begun
            self.assertEqual(asked.call_count, 1)

    def test_a_refusal_comes_before_it(self):
        """It was said minutes later, after the costs."""
        config = tiny(train__batch_size=1_000_000)
        refused = self.assertRaisesRegex(ValueError, "train.batch_size=1000000")
        with mock.patch.object(checks, "lines", side_effect=AssertionError), refused:
            running.stages("clean", config, self.workdir, estimate=True)


class NotesTest(absltest.TestCase):
    def test_a_stage_is_done_if_what_it_made_is_there(self):
        workdir = Path(self.create_tempdir().full_path)
        asked = {"stage": "export:hub", "selected": True, "images": 0, "weights_sha256": "ab"}
        self.assertFalse(running._is_done(workdir, asked))
        (workdir / "made").write_text("it")
        line = asked | {"files": {"made": running.file_sha256(workdir / "made")}}
        (workdir / running.NOTES).write_text(json.dumps(line) + "\n")
        self.assertTrue(running._is_done(workdir, asked))
        for other in ({"weights_sha256": "cd"}, {"images": 9}, {"selected": False}):
            self.assertFalse(running._is_done(workdir, asked | other))
        (workdir / "made").write_text("something else")
        self.assertFalse(running._is_done(workdir, asked))
        line = asked | {"evaluations": ["0a1b"]}
        (workdir / running.NOTES).write_text(json.dumps(line) + "\n")
        self.assertFalse(running._is_done(workdir, asked))

    def test_what_is_in_the_way_of_an_export_stays(self):
        place = Path(self.create_tempdir().full_path)
        new, out = place / "unfinished" / "hub", place / "hub"

        def made(text):
            new.mkdir(parents=True)
            (new / "w").write_text(text)
            return {"w": running.file_sha256(new / "w"), "w.certificate.json": "another date"}

        running._place(new, out, made("one"))
        running._place(new, out, made("one"))  # as after a kill before the note
        self.assertFalse(new.parent.exists())
        said = "hub contains something other than the export of th"
        with self.assertRaisesRegex(ValueError, said):
            running._place(new, out, made("another"))
        self.assertEqual((out / "w").read_text(), "one")
