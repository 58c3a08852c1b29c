"""What the commands with --config.key=value call, with what, and how they end."""

import contextlib
import dataclasses
import functools
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import grain  # noqa: F401  # defines flags, which `flagsaver` must not see for the first time
from absl import flags
from absl.testing import flagsaver, parameterized

from jaxrobust import data
from jaxrobust.commands import evaluate
from jaxrobust.commands.flags import evaluation_help
from jaxrobust.commands.flags.evaluation import EvaluateFlags
from jaxrobust.commands.flags.evaluation_help import GROUPS, USUAL
from jaxrobust.doctor.command import Examination
from jaxrobust.doctor.findings import GREEN, RED, YELLOW, Check, CheckResult, Finding
from jaxrobust.runtime.commandline import help
from jaxrobust.runtime.processes import launch
from jaxrobust.training.run import stopping
from jaxrobust.weights.store.checkpoint import DiskFull
from tests.support import command_calls, sweeps


class FlagsCase(parameterized.TestCase):
    """A command with its own flags, which others may have defined otherwise."""

    name = ""

    def setUp(self):
        super().setUp()
        self.module = self.enter_context(command_calls.with_config(self.name))
        self.enter_context(mock.patch.object(self.module.__dict__.get("patience"), "end"))
        name = self.module.__dict__.get("arguments", self.module)
        with contextlib.suppress(AttributeError):
            self.quiet = self.enter_context(mock.patch.object(name, "quiet_libraries"))
        known = SimpleNamespace(value="configs/quickstart.py")
        self.enter_context(
            mock.patch("ml_collections.config_flags.get_config_filename", return_value=known.value)
        )

    def put(self, name: str, **how) -> mock.Mock:
        """Put a mock in the place of what a command calls."""
        return self.enter_context(mock.patch(f"jaxrobust.{name}", **how))

    def given(self, config=None, **values):
        """Give flags, and a config."""
        own = mock.Mock(value=config)
        self.enter_context(mock.patch.object(self.module, "_CONFIG", own))
        self.enter_context(flagsaver.flagsaver(**values))

    def ended(self, *words, terminal: bool = False) -> command_calls.Ended:
        return command_calls.ended(lambda: self.module.main([self.name, *words]), terminal=terminal)


class DoctorTest(FlagsCase):
    name = "doctor"

    def setUp(self):
        super().setUp()
        self.level = GREEN
        self.answer = self.put("doctor.command.answer", side_effect=self.examined)
        self.enter_context(mock.patch.dict(os.environ, COLUMNS="66"))
        os.environ.pop("NO_COLOR", None)

    def examined(self, values, place, *, tell, **options):
        check = Check("a-check", "measures", "cause", "remedy", "paper", lambda patient: None)
        finding = Finding(check, CheckResult(self.level, "many words " * 9))
        for line in ("the network", finding):
            tell(line)
        return [Examination("the network", [finding])]

    @sweeps.rows((GREEN, 0), (YELLOW, 0), (RED, 1))
    def test_a_run(self, level, code):
        self.level = level
        self.given(n=32, seed=7, devices=4, epsilon="4/255", split="test[:9]")
        ended = self.ended("runs/1")
        self.assertEqual((ended.code, ended.error), (code, ""))
        self.assertRegex(ended.out, rf"\Athe network\n{level} +a-check +many words [^\n]+\n\Z")
        values, place = self.answer.call_args.args
        options = self.answer.call_args.kwargs
        self.assertEqual((values["n"], values["seed"], place), (32, 7, "runs/1"))
        self.assertEqual((values["epsilon"], values["split"]), (4 / 255, "test[:9]"))
        self.assertNoCommonElements(values, ("devices", "json"))
        config = {"config": None, "config_name": None, "devices": 4}
        self.assertLessEqual(config.items(), options.items())
        self.quiet.assert_called_with()

    @sweeps.rows((GREEN, 0), (RED, 1))
    def test_a_config_as_json(self, level, code):
        self.level = level
        self.given(config="a config", json=True)
        ended = self.ended(terminal=True)
        answer = json.loads(ended.out)
        self.assertEqual((ended.code, answer["red"]), (code, level == RED))
        (examined,) = answer["examined"]
        self.assertEqual((examined["of"], examined["findings"][0]["level"]), ("the network", level))
        self.assertIsNone(self.answer.call_args.args[1])
        config = {"config": "a config", "config_name": "quickstart", "devices": None}
        self.assertLessEqual(config.items(), self.answer.call_args.kwargs.items())

    @sweeps.rows(({}, "\033[32mgreen\033[0m"), ({"NO_COLOR": "1"}, "green"))
    def test_colours_and_columns_are_for_terminals(self, environment, start):
        self.given()
        with mock.patch.dict(os.environ, environment):
            lines = self.ended("run", terminal=True).out.splitlines()
        self.assertStartsWith(lines[1], start)
        self.assertBetween(max(map(len, lines[2:])), 50, 66)

    def test_too_few_or_many_images(self):
        for n in (31, 1001):
            with self.subTest(n=n):
                self.given(n=n)
                code, out, said = self.ended("run")
                self.assertEqual((code, out), (2, ""))
                self.assertIn(f"--n={n} must be between 32 and 1000; omit it to use 200", said)
                self.answer.assert_not_called()

    def test_the_ends_are_inside(self):
        for n in (32, 1000):
            self.given(n=n)
            self.assertEqual(self.ended("run").code, 0)

    def test_how_it_ends(self):
        self.given()
        self.assertIn("unexpected argument 'two'", self.ended("one", "two").error)
        self.assertEqual(self.ended("one", "two").code, 2)
        for error, code in ((OSError("a full disk"), 3), (KeyboardInterrupt(), 130)):
            self.answer.side_effect = error
            self.assertEqual(self.ended("run").code, code)


class TrainTest(FlagsCase):
    name = "train"

    def setUp(self):
        super().setUp()
        self.calls = mock.Mock()
        self.calls.stages.return_value = [SimpleNamespace(text="select"), SimpleNamespace(text="b")]
        self.calls.opened.side_effect = lambda flag, folder: Path("/opened", folder)
        of = {"running.stages": "results.stages", "running.run": "results.stages"}
        for name, folder in of.items():
            own = getattr(self.calls, "stages" if "stages" in name else "follow")
            self.put(f"{folder}.{name}", new=own)
        self.put("training.run.run.run", new=self.calls.train)
        self.put("runtime.files.buckets.opened", new=self.calls.opened)
        self.put("runtime.devices.profiling.profile", new=self.calls.profile)
        self.put("results.configs.refusals.parts_refused", new=lambda config: self.mistakes)
        self.mistakes = []
        self.put("training.run.start_runs.again", side_effect=lambda c, f: f"again {c} in {f}")
        self.enter_context(mock.patch.object(self.module, "_use", new=self.calls.use))
        self.enter_context(mock.patch.object(launch, "cores", return_value=5))
        self.pod = self.enter_context(mock.patch.object(self.module, "hosts", return_value=None))
        self.join = self.enter_context(mock.patch.object(self.module.Ending, "join"))

    def test_training_and_then_the_stages(self):
        self.given(config="c", workdir="w", then="select,b", estimate=False, profile="2:3")
        self.assertEqual(self.ended(), (0, "", ""))
        names = [name for name, _, _ in self.calls.mock_calls]
        self.assertEqual(names, ["opened", "profile", "use", "stages", "train", "follow"])
        self.quiet.assert_called_once_with()
        place = Path("/opened/w")
        self.calls.profile.assert_called_once_with("2:3")
        self.calls.use.assert_called_once_with(5)
        self.calls.stages.assert_called_once_with("select,b", "c", place, estimate=False)
        self.assertEqual(self.calls.train.call_args.args, ("c", place))
        self.assertEqual(
            self.calls.train.call_args.kwargs["profile"], self.calls.profile.return_value
        )
        self.assertIsNotNone(self.calls.train.call_args.kwargs["draw"])
        stages = self.calls.stages.return_value
        self.assertEqual(self.calls.follow.call_args.args, (stages, "c", place))
        self.join.assert_not_called()

    def test_what_is_not_given(self):
        self.given(config="c")
        self.assertEqual(self.ended().code, 0)
        self.calls.opened.assert_called_once_with("workdir", "runs/quickstart")
        self.calls.profile.assert_not_called()
        self.assertIsNone(self.calls.train.call_args.kwargs["profile"])
        place = Path("/opened/runs/quickstart")
        self.calls.stages.assert_called_once_with(None, "c", place, estimate=True)

    def test_a_pod_is_joined_and_keeps_its_devices(self):
        self.pod.return_value = {"coordinator": "a:1"}
        self.given(config="c")
        with mock.patch.object(self.module.patience, "of") as waiting:
            self.assertEqual(self.ended().code, 0)
        waiting.assert_called_once_with(mock.ANY, here=False)  # joining has its own words
        self.join.assert_called_once_with({"coordinator": "a:1"})
        self.calls.use.assert_not_called()

    def test_only_a_config(self):
        for config, words in ((None, ()), ("c", ("word",))):
            with self.subTest(row=(config, words)):
                self.given(config=config)
                code, _, said = self.ended(*words)
                self.assertEqual(code, 2)
                self.assertIn(
                    "name one config as the first argument; change its keys with --config.key",
                    said,
                )
                self.calls.train.assert_not_called()

    def test_all_mistakes(self):
        self.given(config="c")
        self.calls.train.side_effect = ValueError("b")
        self.mistakes = ["a", "b", "key=b"]
        self.assertEqual(self.ended(), (2, "", "jaxrobust: 2 mistakes:\n- a\n- key=b\n"))

    def test_how_it_ends(self):
        for error, code, said in (
            (stopping.Stopped("NaN"), 3, "NaN"),
            (stopping.Preempted("saved"), 75, "saved"),
            (stopping.Interrupted("saved"), 130, "saved"),
            (stopping.BadData("damaged"), 2, "damaged"),
            (KeyboardInterrupt(), 130, "interrupted; again c in /opened/w"),
            (ValueError("a wrong key"), 2, "jaxrobust: a wrong key\n"),
            (DiskFull(28, "no space"), 3, "jaxrobust: no space\n"),
            (OSError("no network"), 3, "no network. Once this is fixed, again c in /opened/w"),
        ):
            with self.subTest(row=(error, code, said)):
                self.given(config="c", workdir="w")
                self.calls.train.side_effect = error
                found = self.ended()
                self.assertEqual(found.code, code)
                self.assertIn(said, found.error)
                self.calls.follow.assert_not_called()

    def test_a_stage_that_has_begun_is_what_continues(self):
        def follow(stages, config, workdir, begin):
            for stage in stages:
                begin(stage)
            raise KeyboardInterrupt

        self.given(config="c")
        self.calls.follow.side_effect = follow
        found = self.ended()
        self.assertEqual(found.code, 130)
        self.assertIn("interrupted; run the same command to continue with b", found.error)

    def test_a_fault_of_the_program_ends_a_host_of_a_pod_at_once(self):
        self.given(config="c")
        self.calls.train.side_effect = KeyError("x")
        with self.assertRaises(KeyError):
            self.ended()
        self.pod.return_value = {}
        found = self.ended()
        self.assertEqual(found.code, 1)
        self.assertIn("Traceback", found.error)

    def test_a_fault_of_the_users_function_is_a_sentence(self):
        self.given(config="c")
        self.calls.train.side_effect = TypeError("x")
        with mock.patch("jaxrobust.runtime.commandline.functions.of_users", return_value="net.py"):
            found = self.ended()
        self.assertEqual((found.code, found.error), (2, "jaxrobust: net.py\n"))


class CoresTest(FlagsCase):
    """How many CPU devices a training gets."""

    name = "train"

    def test_a_device_for_each_core_unless_there_is_a_reason(self):
        for cores, reason, devices, said in (
            (4, None, 4, False),
            (4, "batch norm", None, True),
            (1, "one core", None, False),
            (None, None, None, False),
            (4, "batch norm on a GPU", None, False),
        ):
            with self.subTest(row=(cores, reason, devices, said)):
                self.given(config="c")
                backend = "gpu" if reason and "GPU" in reason else "cpu"
                with (
                    mock.patch("jaxrobust.training.build.one_device", return_value=reason) as asked,
                    mock.patch("jax.config.update") as update,
                    mock.patch("jax.default_backend", return_value=backend),
                    mock.patch.object(launch, "patient_collectives") as patient,
                ):
                    found = command_calls.ended(functools.partial(self.module._use, cores))
                patient.assert_called_once_with()
                self.assertEqual(asked.mock_calls, [mock.call("c", cores)] if cores else [])
                expected = [mock.call("jax_num_cpu_devices", devices)] if devices else []
                self.assertEqual(update.mock_calls, expected)
                line = (
                    f"using one CPU device for all {cores} cores instead of one per core: {reason}"
                )
                self.assertEqual(line in found.error, said)


class EstimateTest(parameterized.TestCase):
    def test_words_and_changes(self):
        from jaxrobust.commands import estimate

        words = ("quickstart", "--config.seed", "3", "--on=h100:8", "--price=1/2", "--batch=9")
        words = (*words, "--fsdp=2", "--seconds=5", "--robust=0.25", "--images=7", "--fast")
        with mock.patch.object(estimate.command, "answer", return_value={"a": 1}) as answer:
            code, out, said = command_calls.words(
                estimate.main, *words, "--utilisation=0.4", "--json", "--config.a.b=c"
            )
        self.assertEqual((code, out, said), (0, '{"a": 1}\n', ""))
        given, changed, begun = answer.call_args.args
        self.assertEqual(changed, ["--config.seed", "3", "--config.a.b=c"])
        self.assertEqual(begun, estimate.BEGUN)
        self.assertEqual((given.config, given.on, given.price), ("quickstart", "h100:8", 0.5))
        self.assertEqual((given.batch, given.fsdp, given.seconds), (9, 2, 5.0))
        self.assertEqual((given.robust, given.images, given.fast), (0.25, 7, True))
        self.assertEqual(given.utilisation, 0.4)
        text = " ".join(command_calls.words(estimate.main, "--help").out.split())
        self.assertIn("CONFIG --on DEVICES [--config.key=value ...] [flags]", text)
        self.assertIn("config as for training: --config.train.epochs=20.", text)


class EvaluateTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.answer = self.enter_context(
            mock.patch(
                "jaxrobust.evaluation.questions.command.answer", return_value=("a table", True)
            )
        )
        self.pod = self.enter_context(mock.patch.object(evaluate, "hosts", return_value=None))
        self.join = self.enter_context(mock.patch.object(evaluate.Ending, "join"))
        self.quiet = self.enter_context(mock.patch.object(evaluate, "quiet_libraries"))

    def ended(self, *words, **values) -> command_calls.Ended:
        network = {} if words else {"workdir": "w"}
        with flagsaver.flagsaver(**network | values):
            return command_calls.ended(lambda: evaluate.main(["evaluate", *words]))

    def test_no_network(self):
        found = self.ended(workdir=None)
        self.assertEqual(found.code, 2)
        self.assertRegex(found.error, "name a network as the first argument: .*, or quickstart\n")

    def test_what_is_asked(self):
        values = {"workdir": "w", "epsilon": "4/255", "n": "9", "seed": 3, "again": True}
        values |= {"replay": ["a", "b"], "threat": ["linf:1/255", "l2:1"], "ladder": "linf:0:1:2"}
        values |= {"radius_at": 48}
        with mock.patch.object(evaluate.mistakes, "check") as check:  # some contradict others
            found = self.ended(image_size=[32, 64], **values)
        self.assertEqual((found.code, found.out), (0, "a table\n"))
        self.assertEqual(check.call_args, self.answer.call_args)
        self.quiet.assert_called_once_with()
        given, *rest = self.answer.call_args.args
        self.assertEqual(rest, [(32, 64), ("linf:1/255", "l2:1"), "linf:0:1:2", 48])
        self.assertIsNone(given.image_size)  # of several it is none
        self.assertEqual((given.workdir, given.epsilon, given.n), ("w", 4 / 255, 9))
        self.assertEqual((given.seed, given.again, given.replay), (3, True, ("a", "b")))
        self.join.assert_not_called()

    def test_what_is_not_asked(self):
        self.ended(image_size=[48])
        given, *rest = self.answer.call_args.args
        self.assertEqual(rest, [(48,), (), None, None])
        self.assertEqual((given.image_size, given.n, given.attack), (48, 0, "autoattack"))

    def test_corruptions_are_of_clean_images(self):
        self.ended(corruptions="fog")
        self.assertEqual(self.answer.call_args.args[0].attack, "clean")
        attack = flags.FLAGS["attack"]
        with mock.patch.object(type(attack), "using_default_value", False, create=True):
            attack.using_default_value = False
            self.addCleanup(setattr, attack, "using_default_value", True)
            found = self.ended(corruptions="fog")
        self.assertEqual(found.code, 2)
        self.assertIn("leave --attack=autoattack out", found.error)
        self.answer.assert_called_once()

    def test_the_first_process_prints(self):
        self.answer.return_value = ("", False)
        self.assertEqual(self.ended().out, "")

    def test_a_pod_is_joined(self):
        self.pod.return_value = {"processes": 2}
        with mock.patch.object(evaluate.patience, "of") as waiting:
            self.ended()
        waiting.assert_called_once_with(mock.ANY, here=False)  # joining has its own words
        self.join.assert_called_once_with({"processes": 2})

    def test_how_it_ends(self):
        for error, code, said in (
            (
                KeyboardInterrupt(),
                130,
                "interrupted; run the same command to continue with the verdicts",
            ),
            (ValueError("a wrong flag"), 2, "jaxrobust: a wrong flag\n"),
            (
                OSError("no network"),
                3,
                "no network. Once this is fixed, run the same command again",
            ),
            (MemoryError("9 GiB for an array"), 3, "too little memory (9 GiB); use smaller images"),
        ):
            with self.subTest(row=(error, code, said)):
                self.answer.side_effect = error
                found = self.ended()
                self.assertEqual((found.code, found.out), (code, ""))
                self.assertIn(said, found.error)

    def test_an_attack_of_fixed_steps_starts_again(self):
        self.answer.side_effect = KeyboardInterrupt
        said = self.ended(attack="pgd-20").error
        self.assertIn("start over, because nothing was saved yet", said)

    def test_a_target(self):
        for word, flag in (
            ("net.py:f", "function"),
            ("package.nets:Net.f", "function"),
            ("torch:net.py:f", "torch"),
            ("torch:package.nets:f", "torch"),
            ("w", "weights"),
            ("quickstart:pretrain", "weights"),
        ):
            with self.subTest(word):
                self.assertEqual(self.ended(word).code, 0)
                value = getattr(self.answer.call_args.args[0], flag)
                self.assertEqual(value, word.removeprefix("torch:"))
        self.assertIn("unexpected argument 'b'", self.ended("a", "b").error)
        self.assertIn("w and --weights=v both name the network", self.ended("w", weights="v").error)

    def test_a_fault_of_the_program(self):
        self.answer.side_effect = KeyError("x")
        with self.assertRaises(KeyError):
            self.ended()
        self.pod.return_value = {}
        found = self.ended()
        self.assertEqual(found.code, 1)
        self.assertIn("Traceback", found.error)
        with mock.patch.object(evaluate.functions, "of_users", return_value="net.py, line 3"):
            self.assertEqual(self.ended()[::2], (2, "jaxrobust: net.py, line 3\n"))


class HelpTest(parameterized.TestCase):
    """The attacks and data sets stand in the help, if that is asked for."""

    def setUp(self):
        super().setUp()
        known = evaluate.flags.FLAGS
        for name in ("attack", "dataset", "relative_step", "start"):
            self.enter_context(mock.patch.object(known[name], "help", "before."))

    def test_what_there_is(self):
        evaluation_help.describe_attacks()
        known = evaluate.flags.FLAGS
        fixed, searching = known["attack"].help.split("\nParts of AutoAttack:\n")
        self.assertStartsWith(fixed, "before.\nAttacks with K steps:\n")
        self.assertIn("\npgd ", fixed)
        self.assertNotIn("fab-t", fixed)
        self.assertIn("fab-t", searching)
        self.assertRegex(searching, "\nsparse-rs +Sparse-RS in L0, which needs no gradient")
        self.assertIn("for pgd-", known["relative_step"].help)
        self.assertIn("for pgd-", known["start"].help)
        for kind in data.source.KINDS.values():
            self.assertIn(f"\n{kind.written}: {kind.help}", known["dataset"].help)

    def test_each_flag_is_in_one_group(self):
        grouped = " ".join(GROUPS.values()).split()
        names = [field.name for field in dataclasses.fields(EvaluateFlags)]
        hosts = GROUPS["Several hosts"].split()
        self.assertCountEqual(grouped, [*names, *hosts])
        rows = help.of_absl(grouped)
        text = help.page("What it does.", rows, groups=GROUPS)
        self.assertEqual(re.findall(r"^  --(\w+)", text, re.MULTILINE), grouped)
        self.assertNotIn("Flags:", text)  # which are in no group
        self.assertNotIn("repeat this option", text)
        usual = help.page("What it does.", rows, usual=USUAL)
        self.assertEqual(re.findall(r"^  --(\w+)", usual, re.MULTILINE), USUAL.split())
        self.assertEndsWith(usual, "\n--help-all lists all flags.")
