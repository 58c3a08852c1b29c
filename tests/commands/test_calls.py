"""What commands make of their words: what they call, with what, what they print, how they end."""

import json
import os
from pathlib import Path
from unittest import mock

from absl.testing import parameterized

from jaxrobust.commands import compare, prepare, verify, why
from jaxrobust.commands.conversion import certificate, export_weights, import_weights
from jaxrobust.papers.commands import analyse, landscape, plan, reproduce, sparsity
from jaxrobust.runtime.devices import compilation
from tests.support import command_calls


class CallCase(parameterized.TestCase):
    def put(self, name: str, **how) -> mock.Mock:
        """Put a mock in the place of what a command calls."""
        return self.enter_context(mock.patch(f"jaxrobust.{name}", **how))

    def refused(self, main, *words) -> str:
        code, out, said = command_calls.words(main, *words)
        self.assertEqual((code, out, said.count("\n")), (2, "", 1), said)
        return said


class CompareTest(CallCase):
    def setUp(self):
        super().setUp()
        of = "results.comparison"
        self.load = self.put(f"{of}.evaluations.load", return_value="loaded")
        self.find = self.put(f"{of}.comparison_findings.find", return_value="found")
        plain = self.put(f"{of}.comparison_findings.plain", side_effect=lambda found: {"of": found})
        document = self.put(f"{of}.comparison_markdown.document", return_value="a page\n")
        self.seen, self.write = (plain, document), self.put(f"{of}.picture.write")

    def test_pictures_that_cannot_be_drawn_are_refused_before_anything_is_read(self):
        self.put("results.plotting.plotting", side_effect=ValueError("no matplotlib"))
        self.assertIn("no matplotlib", self.refused(compare.main, "a", "b", "--out=there"))
        self.load.assert_not_called()
        self.assertEqual(command_calls.words(compare.main, "a", "b").code, 0)


def on() -> str | None:
    """Return the platform on which JAX would compute."""
    return os.environ.get("JAX_PLATFORMS")


class PlanTest(CallCase):
    def setUp(self):
        super().setUp()
        self.answer = self.put("papers.planning.answer.of", return_value="the plan")

    def test_nothing_computes_unless_a_platform_is_named(self):
        for named, platform in ((None, "cpu"), ("tpu", "tpu")):
            with self.subTest(row=(named, platform)):
                self.answer.side_effect = lambda flags, made_by: on()
                with mock.patch.dict(os.environ, {"JAX_PLATFORMS": named} if named else {}):
                    if not named:
                        os.environ.pop("JAX_PLATFORMS", None)
                    ended = command_calls.words(plan.main, "revisiting_at", "--on=h100:8")
                self.assertEqual(ended.out, f"{platform}\n")

    def test_mistakes(self):
        for paper, words, sentence in (
            ("revisiting", (), "revisiting is not a paper; did you mean revisiting_at"),
            ("revisiting_at", ("--row=1",), "--row 1 needs a table; name it with --table"),
            ("revisiting_at", ("--budget=0",), "--budget=0 must be above 0 hours"),
            ("revisiting_at", ("--budget=-1",), "--budget=-1 must be above 0 hours"),
            ("revisiting_at", ("--budget=inf",), "--budget=inf must be above 0 hours"),
            ("revisiting_at", ("--budget=nan",), "--budget=nan must be above 0 hours"),
            ("revisiting_at", ("--utilisation=0",), "must be above 0 and at most 1"),
            ("revisiting_at", ("--utilisation=1.01",), "must be above 0 and at most 1"),
        ):
            with self.subTest(row=(paper, words, sentence)):
                self.assertIn(sentence, self.refused(plan.main, paper, "--on=h100:8", *words))
                self.answer.assert_not_called()

    def test_what_cannot_be_planned(self):
        for error, code, words in (
            (ValueError("no such table"), 2, "no such table"),
            (OSError("no such folder"), 3, "no such folder"),
            (
                OSError(30, "Read-only file system", "/there"),
                3,
                ": /there: Read-only file system\n",
            ),
        ):
            with self.subTest(row=(error, code)):
                self.answer.side_effect = error
                ended = command_calls.words(plan.main, "revisiting_at", "--on=h100:8")
                self.assertEqual((ended.code, ended.out), (code, ""))
                self.assertIn(words, ended.error)


class PrepareTest(CallCase):
    def test_the_rest_goes_to_the_command_of_the_data_set(self):
        for name in prepare.COMMANDS:
            with mock.patch.dict(prepare.COMMANDS, {name: mock.Mock()}):
                command_calls.words(prepare.main, name, "--out=there", "word")
                prepare.COMMANDS[name].assert_called_once_with(["--out=there", "word"])
                with mock.patch("sys.argv", ["prepare", "mnist", "--out=there"]):
                    prepare.main([name])
                prepare.COMMANDS[name].assert_called_with([])

    def test_others_names_of_data_sets(self):
        for word, name in (
            ("CIFAR-10", "cifar10"),
            ("torch/cifar100", "cifar100"),
            ("ImageNet-1k", "imagenet"),
            ("imagenet2012", "imagenet"),
        ):
            with (
                self.subTest(row=(word, name)),
                mock.patch.dict(prepare.COMMANDS, {name: mock.Mock()}),
            ):
                command_calls.words(prepare.main, word, "--out=there")
                prepare.COMMANDS[name].assert_called_once_with(["--out=there"])

    def test_both_cifars_are_told_apart(self):
        for name in ("cifar10", "cifar100"):
            with self.subTest(name=name):
                self.assertEqual(prepare.COMMANDS[name].args, (name,))

    def test_help_and_mistakes(self):
        for word in ("-h", "--help"):
            ended = command_calls.words(prepare.main, word)
            self.assertEqual((ended.code, ended.out), (0, f"{prepare.__doc__}\n"))
        said = self.refused(prepare.main, "mnist")
        self.assertIn("prepare does not support 'mnist'; choose one of imagenet, cifar10,", said)
        self.assertIn("prepare needs a data set; choose one of", self.refused(prepare.main))
        none = self.refused(lambda: prepare.main([]), "cifar10")  # those of who calls it count
        self.assertIn("prepare needs a data set; choose one of", none)


class ReproduceTest(CallCase):
    def setUp(self):
        super().setUp()
        self.answer = self.put("papers.tables.documents.answer", return_value="tables\n")

    def test_what_cannot_be_shown(self):
        for error, code in ((ValueError("no such paper"), 2), (OSError("a full disk"), 3)):
            with self.subTest(row=(error, code)):
                self.answer.side_effect = error
                ended = command_calls.words(reproduce.main)
                self.assertEqual((ended.code, ended.out), (code, ""))
                self.assertIn(str(error), ended.error)


class VerifyTest(CallCase):
    def test_the_exit_code_says_whether_all_is_confirmed(self):
        for whole, code in ((True, 0), (False, 1)):
            with self.subTest(row=(whole, code)):
                check = self.put(
                    "evaluation.questions.verification.verify", return_value={"whole": whole}
                )
                words = ("there", "--weights=w", "--dataset=d", "--split=s", "--classes=c")
                words = (*words, "--data_dir=f", "--batch=3", "--frost=g", "--json")
                found = []
                ended = command_calls.words(lambda found=found: found.append(verify.main()), *words)
                self.assertEqual((found, ended.out), ([code], json.dumps({"whole": whole}) + "\n"))
                (given,) = check.call_args.args
                own = {"bundle": Path("there"), "weights": "w", "function": None, "dataset": "d"}
                own |= {"split": "s", "classes": "c", "data_dir": "f", "batch": 3, "frost": "g"}
                own |= {"sample": 60, "seed": None}
                self.assertEqual(given._asdict(), own)

    def test_images_are_written_without_weights(self):
        write = self.put(
            "evaluation.questions.verification.write_images", return_value={"images": 3}
        )
        found = []
        words = ("there", "--write_images=x.npy")
        command_calls.words(lambda: found.append(verify.main()), *words)
        self.assertEqual(found, [0])
        given, file = write.call_args.args
        self.assertEqual((given.bundle, given.weights, file), (Path("there"), None, Path("x.npy")))


class WhyTest(CallCase):
    def test_its_help_says_what_stands_where(self):
        out = command_calls.words(why.main, "--help").out
        self.assertIn("CONFIG [KEY] [--config.key=value ...] [flags]", " ".join(out.split()))


class NetworksTest(CallCase):
    def test_an_analysis_that_fails(self):
        self.put("papers.networks.analyses.checked", side_effect=OSError("a full disk"))
        ended = command_calls.words(analyse.main, "effectiveness")
        self.assertEqual((ended.code, ended.out), (3, ""))
        self.assertIn("Once this is fixed, run the same command again", ended.error)

    def test_libraries_are_quiet_while_it_computes(self):
        for command, name, words in (
            (analyse, "papers.networks.analyses.written", ("effectiveness",)),
            (landscape, "papers.networks.landscape.written", ("--workdir=w",)),
            (sparsity, "papers.networks.sparsity.written", ("--workdir=w",)),
        ):
            with self.subTest(row=(command, name, words)):
                self.put("papers.networks.analyses.checked")
                written = self.put(name, return_value=[])
                with mock.patch.object(command, "quiet_libraries") as quiet:
                    written.side_effect = lambda *given: quiet.assert_called_once_with() or []
                    self.assertEqual(command_calls.words(command.main, *words), (0, "\n", ""))


class ConversionTest(CallCase):
    def setUp(self):
        super().setUp()
        self.cache = self.enter_context(mock.patch.object(compilation, "use_persistent_cache"))
        logs = mock.patch.object(export_weights.logging, "set_verbosity")
        self.logs = self.enter_context(logs)

    def test_a_certificate(self):
        for agrees, code in ((True, 0), (None, 0), (False, 1)):
            with self.subTest(row=(agrees, code)):
                compare_them = self.put(
                    "publish.certificate.compare", return_value={"agrees": agrees, "of": 1}
                )
                words = (
                    "--weights=w",
                    "--against=t.pt",
                    "--model=m",
                    "--image_size=64",
                    "--images=i",
                )
                ended = command_calls.words(
                    certificate.main, *words, "--options={'a': 1}", "--json"
                )
                self.assertEqual(
                    (ended.code, json.loads(ended.out)), (code, {"agrees": agrees, "of": 1})
                )
                own = {"model": "m", "image_size": 64, "options": {"a": 1}, "images": Path("i")}
                compare_them.assert_called_once_with(Path("w"), Path("t.pt"), **own)
                self.cache.assert_called_with()

    def test_no_certificate(self):
        for error, code in (
            (ValueError("no names"), 2),
            (RuntimeError("no pickle"), 2),
            (OSError("a full disk"), 3),
        ):
            with self.subTest(row=(error, code)):
                self.put("publish.certificate.compare", side_effect=error)
                ended = command_calls.words(
                    certificate.main, "--weights=w", "--against=t.pt", "--json"
                )
                self.assertEqual((ended.code, ended.out), (code, ""))
                self.assertIn(str(error), ended.error)

    def test_an_export(self):
        export = self.put("publish.export_torch.export", return_value={"file": "f"})
        words = ("--workdir=w", "--phase=p", "--which=raw", "--selected", "--layout=hub")
        words = (*words, "--out=there", "--record=r.jsonl", "--evaluation=e", "--id=i")
        words = (*words, "--confirm=5", "--license=mit", "--nocertificate", "--json")
        ended = command_calls.words(export_weights.main, *words)
        self.assertEqual((ended.code, json.loads(ended.out)), (0, {"file": "f"}))
        (given,) = export.call_args.args
        self.assertEqual((given.workdir, given.phase, given.which), (Path("w"), "p", "raw"))
        self.assertEqual((given.selected, given.layout, given.out), (True, "hub", Path("there")))
        self.assertEqual((given.record, given.evaluation, given.id), (Path("r.jsonl"), "e", "i"))
        self.assertEqual((given.confirm, given.license, given.nocertificate), (5, "mit", True))
        self.cache.assert_called_once_with()
        self.logs.assert_called_once_with(export_weights.logging.FATAL)

    def test_an_import(self):
        call = self.put("publish.import_torch.import_weights", return_value={"folder": "f"})
        words = ("source", "--model=m", "--out=there", "--image_size=64", "--num_classes=7")
        words = (*words, "--options={'a': 1}", "--init_stem", "--which=ema", "--normalize=none")
        words = (*words, "--sha256=abc", "--cast", "--seed=3", "--json")
        ended = command_calls.words(import_weights.main, *words)
        self.assertEqual((ended.code, json.loads(ended.out)), (0, {"folder": "f"}))
        source, out, request = call.call_args.args
        self.assertEqual((source, out), ("source", Path("there")))
        self.assertEqual(call.call_args.kwargs, {"sha256": "abc", "certified": True})
        own = {"model": "m", "image_size": 64, "num_classes": 7, "options": {"a": 1}}
        own |= {"init_stem": True, "which": "ema", "normalize": "none", "cast": True, "seed": 3}
        self.assertEqual(request._asdict(), request._field_defaults | own)
        command_calls.words(import_weights.main, "source", "--out=there", "--nocertificate")
        self.assertEqual(call.call_args.kwargs, {"sha256": None, "certified": False})
        self.assertEqual(call.call_args.args[2].normalize, "auto")
