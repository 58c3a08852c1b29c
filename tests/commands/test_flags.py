"""What the help of a flag says counts where it is not given does count."""

import dataclasses
import functools
import importlib
import re

from absl.testing import parameterized

from jaxrobust import __main__ as overview
from jaxrobust.commands.flags import evaluation, shared
from jaxrobust.papers.commands import analyse, scaling
from jaxrobust.papers.networks import analyses
from jaxrobust.runtime.commandline import fields
from tests.support.command_line import refused

# Those of absl define `--config`, which one process can do once.
NAMES = [name for name in overview.COMMANDS if name not in ("train", "doctor", "estimate")]
MODULES = [importlib.import_module(overview.module_of(name)) for name in NAMES]
KINDS = {kind for module in MODULES for kind in vars(module).values() if type(kind) is type}
FLAGS = [kind for kind in KINDS if dataclasses.is_dataclass(kind) and kind.__name__ != "Command"]
FLAGS.sort(key=lambda kind: kind.__name__)


class DefaultsTest(parameterized.TestCase):
    def test_a_number_in_the_help_is_the_default(self):
        for kind in FLAGS:
            with self.subTest(kind=kind):
                for field in dataclasses.fields(kind):
                    said = re.search(r"default: ([\d.e]+?)\.?$", field.metadata["about"].text)
                    if said and field.default is not None:
                        with self.subTest(field.name):
                            self.assertEqual(float(field.default), float(said[1]))

    def test_a_switch_is_off(self):
        for kind in FLAGS:
            with self.subTest(kind=kind):
                switches = {
                    f.name: f.default for f in dataclasses.fields(kind) if f.type in (bool, "bool")
                }
                self.assertEqual(switches, dict.fromkeys(switches, False))

    def test_an_evaluation_is_standard_autoattack_on_all_images(self):
        own = evaluation.EvaluateFlags()
        self.assertEqual(
            (own.attack, own.version, own.search_dtype), ("autoattack", "standard", "float32")
        )
        self.assertEqual((own.n, own.seed, own.threat, own.replay), ("all", 0, (), ()))

    def test_a_flag_of_some_analyses_names_those_that_take_it(self):
        for name in sorted(analyses.OWN):
            with self.subTest(name=name):
                (text,) = (
                    field.metadata["about"].text
                    for field in dataclasses.fields(analyse.AnalyseFlags)
                    if field.name == name
                )
                takers = [key for key, row in analyses.ANALYSES.items() if name in row.takes]
                self.assertEndsWith(text, f" ({', '.join(takers)})")

    def test_numbers_of_an_analysis_begin_at_1(self):
        for name in ("n", "batch", "top", "seeds", "views", "image_size", "num_classes"):
            with self.subTest(name=name):
                words = ["semantic-score", f"--{name}"]
                read = fields.read(analyse.AnalyseFlags, "", [*words, "1"])
                self.assertEqual(getattr(read, name), 1)
                if name not in ("image_size", "num_classes"):  # which the network's own rules check
                    for number in ("0", "-1"):
                        given = [*words, number]
                        said = refused(
                            functools.partial(fields.read, analyse.AnalyseFlags, "", given)
                        )
                        self.assertIn(f"--{name}={number} must be at least 1", said)

    def test_flags_are_found(self):
        self.assertGreater(len(FLAGS), 10)


class SharedTest(parameterized.TestCase):
    def test_a_value_is_read_as_what_it_is(self):
        for word, name, value in (
            ("--epsilon=8/255", "epsilon", 8 / 255),
            ("--options={'depths': (1, 2)}", "options", {"depths": (1, 2)}),
            ('--torch_args={"depth": 28}', "torch_args", {"depth": 28}),
            ("--num_classes=7", "num_classes", 7),
            ("--workdir=runs/1", "workdir", "runs/1"),
        ):
            with self.subTest(row=(word, name, value)):
                read = fields.read(shared.SubjectFlags, "A command.", [word])
                self.assertEqual(getattr(read, name), value)
                others = {k: v for k, v in dataclasses.asdict(read).items() if k != name}
                self.assertEqual(others, dict.fromkeys(others))  # which were not given

    def test_a_help_names_the_default_of_its_command(self):
        texts = {f.name: f.metadata["about"].text for f in dataclasses.fields(shared.SubjectFlags)}
        self.assertEndsWith(texts["epsilon"], "in units of [0, 1] pixels; default: from the run.")
        self.assertEndsWith(texts["workdir"], "radius to use.")
        other = shared.shared("phase", default="the first").metadata["about"].text
        self.assertEqual(other, "Phase of the run, such as pretrain or train; default: the first.")


class ScalingTest(parameterized.TestCase):
    def test_the_published_networks_stand_beside(self):
        for block, prefix in (("basic", "wrn_a"), ("robust", "robustresnet_a")):
            with self.subTest(row=(block, prefix)):
                found = scaling.run(scaling.ScalingFlags(multiply_adds=1e9, block=block))
                names = ["solution", "rounded", *(f"{prefix}{i}" for i in (1, 2, 3, 4))]
                self.assertEqual(list(found["networks"]), names)
                solution, rounded = found["networks"]["solution"], found["networks"]["rounded"]
                self.assertAlmostEqual(solution["multiply_adds"] / 1e9, 1, places=3)
                self.assertAlmostEqual(
                    solution["r_D"], 0.7, places=3
                )  # the rule's share of the depth
                self.assertAlmostEqual(found["share"], rounded["multiply_adds"] / 1e9, places=6)

    def test_the_config_of_a_study(self):
        for name, options, line in (
            ("wrn_28_10", {"depths": (2, 3, 4)}, "wrn_28_10,depths=2-3-4"),
            ("r", {"first_conv": True, "se": False, "width": 2}, "r,se=no,width=2"),
            ("r", {"se": True}, "r,se=yes"),
        ):
            with self.subTest(row=(name, options, line)):
                self.assertEqual(scaling._config(name, options), f"configs/cifar_bat.py:{line}")
